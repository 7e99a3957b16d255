"""Fixed texts: one that a model is measured on where a run reads none, and the prompts that it continues."""

PROMPTS = (
    "The most important thing about the ocean is",
    "When the train arrived at the station, she",
    "To make good bread at home, you need",
)

# Written for this purpose. Plain prose on several subjects, some four hundred tokens.
PROSE = """\
The river rises in the hills north of the town, and for most of the year it is no wider than a road. In spring, when
the snow melts, it fills the meadows on both sides, and the farmers move their sheep to higher ground. A stone bridge
with three arches was built here in the seventeenth century. It carried all the traffic between the coast and the
capital until the railway came, and people still call the inn beside it the Halfway House.

A thermometer measures temperature by the change of something that is easier to see. In the oldest kind it is the
volume of a liquid: mercury or coloured alcohol expands as it becomes warmer and climbs in a narrow tube. Later
instruments use the electrical resistance of a metal, which grows in nearly the same proportion, or the infrared light
that every body gives off. None of them reads the temperature of the air unless it is shaded from the sun.

Her grandmother had kept the letters in a tin box under the stairs. There were forty of them, tied with a piece of
string, and the first was dated in the autumn before the war. "You should read them in order," she said, "or you will
not understand why he came back." It took the whole afternoon. When the light began to fail, she put the last one down
and went to the window, because she did not want anybody to see her face.

To replace the filter, switch the machine off and wait until it is cold. Turn the cover to the left, lift it, and take
the old filter out. Rinse the new one under running water for about two minutes, press it into place until it clicks,
and close the cover. If the red lamp is still on after that, check whether the tank has been filled.
"""
