"""Specs: text and dictionaries are faithful, and contradictions are refused in one line."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flatquant import formats
from flatquant.errors import FlatQuantError, SpecError
from flatquant.recipes import autoround, flatquant, gptq, oac, quarot, recipe, rtn, vptq
from flatquant.spec import (
    SITES,
    BlockPlan,
    CacheBits,
    CodebookSpec,
    DataSpec,
    EndToEndSpec,
    FitSpec,
    HeadGrids,
    HeadPlan,
    Plan,
    QuantSpec,
    Recipe,
    RoundingSpec,
    Scheme,
    SiteBits,
    SitePlan,
    SolverSpec,
    TransformSpec,
    from_dict,
    to_dict,
)

# ------------------------------------------------------------------------------------------ the grammar

bits = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
maybe_bits = st.none() | bits


@st.composite
def schemes(draw) -> tuple[str, dict[str, Any]]:
    """A scheme's text, parts left out or written as 16 at random, and what it means."""
    w, a = draw(maybe_bits), draw(maybe_bits)
    group = draw(st.none() | st.sampled_from([2, 32, 128])) if w not in (None, 16) else None
    text = (f"w{w}" if w else "") + (f"g{group}" if group else "") + (f"a{a}" if a else "")
    if draw(st.booleans()):
        k = v = draw(bits)
        text += f"kv{k}"
    else:
        k, v = draw(maybe_bits), draw(maybe_bits)
        text += (f"k{k}" if k else "") + (f"v{v}" if v else "")
    if not text:
        text, w = "w16", 16
    overrides = {}
    for key in draw(st.lists(st.tuples(st.none() | st.integers(0, 40), st.sampled_from(SITES)), unique=True)):
        name = key[1] if key[0] is None else f"{key[0]}.{key[1]}"
        ow, oa = draw(st.sampled_from([(4, None), (None, 8), (16, 16), (3, 5), (16, None)]))
        overrides[name] = SiteBits(weights=ow, activations=oa)
        text += f",{name}=" + (f"w{ow}" if ow else "") + (f"a{oa}" if oa else "")
    cache_overrides = {}
    for block in draw(st.lists(st.integers(0, 40), unique=True)):
        k2, v2 = draw(st.tuples(maybe_bits, maybe_bits).filter(any))
        cache_overrides[str(block)] = CacheBits(keys=k2, values=v2)
        if k2 == v2 and draw(st.booleans()):
            text += f",{block}.kv{k2}"
        else:
            both = [f"k{k2}"] * bool(k2) + [f"v{v2}"] * bool(v2)
            text += "".join(f",{block}.{part}" for part in ([*both] if draw(st.booleans()) else ["".join(both)]))
    head = None
    if draw(st.booleans()):
        hw, hg, ha = draw(bits.filter(lambda b: b < 16)), draw(st.sampled_from([None, 2, 128])), draw(maybe_bits)
        inputs = None if ha in (None, 16) else QuantSpec(bits=ha)
        head = HeadGrids(weights=QuantSpec(bits=hw, group_size=hg), activations=inputs)
        text += f",lm_head=w{hw}" + (f"g{hg}" if hg else "") + (f"a{ha}" if ha else "")
    embedding = None
    if draw(st.booleans()):
        eb, eg = draw(bits.filter(lambda b: b < 16)), draw(st.sampled_from([None, 2, 128]))
        embedding = QuantSpec(bits=eb, group_size=eg)
        text += f",embed_tokens=w{eb}" + (f"g{eg}" if eg else "") + draw(st.sampled_from(["", "a16"]))
    ends = {"head": head, "embedding": embedding}
    drawn = {"weights": w, "activations": a, "keys": k, "values": v}
    means = {name: None if b == 16 else b for name, b in drawn.items()}
    return text, {**means, "group": group, "overrides": overrides, "cache_overrides": cache_overrides, **ends}


@given(schemes(), st.sampled_from(["none", "learned"]))
def test_a_scheme_means_what_it_says_and_says_what_it_means(drawn: tuple[str, dict], clip: Any) -> None:
    text, means = drawn
    scheme = Scheme.parse(text, clip=clip)
    for name in ("weights", "activations", "keys", "values"):
        spec = getattr(scheme, name)
        assert (spec.bits if spec else None) == means[name]
        if spec:
            assert spec.symmetric == (name in ("weights", "activations"))
            assert spec.clip == clip
            assert spec.group_size == (means["group"] if name == "weights" else None)
    assert scheme.overrides == means["overrides"]
    assert scheme.cache_overrides == means["cache_overrides"]
    assert scheme.head == means["head"]
    assert scheme.embedding == means["embedding"]
    assert Scheme.parse(str(scheme), clip=clip) == scheme
    assert Scheme.parse(text.upper().replace(",", " , "), clip=clip) == scheme
    assert from_dict(Scheme, json.loads(json.dumps(to_dict(scheme)))) == scheme


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "4", "w", "wa4", "a4w4", "w4a4kv4k4", "w4a4q4", "w4 a4", "w-4", "w4.5", "int4",
        "w0", "w1", "a9", "kv17", "w32", "k1",  # no such grid
        "g128", "g128a4", "w16g128", "w4g1", "w4g0", "a4g128",  # groups are for quantised weights
        "w4,", "w4,mlp_mid", "w4,mlp=w8", "w4,mlp_mid=8", "w4,mlp_mid=w9", "w4,mlp_mid=kv4", "w4,-1.mlp_mid=w8",
        "w4,mlp_mid=w8,mlp_mid=w8", "w4,1.mlp_mid=w8,01.mlp_mid=w3", "w4,qk=w8",
        "w4a4kv4,attn_in=", "w4,0.attn_in=",  # an override of nothing
        "kv4,k8", "kv4,kv8", "kv4,0.", "kv4,0.k", "kv4,0.k9", "kv4,0.k1", "kv4,-1.k8", "kv4,0.k=8", "kv4,0.v4k4",
        "kv4,0.k8,0.k8", "kv4,0.k8,00.k4", "kv4,0.kv8,0.v4", "kv4,0.w8", "kv4,0.k8g32", "kv4,x.k8", "0.k8",
        "w4,lm_head", "w4,lm_head=", "w4,lm_head=a8", "w4,lm_head=w16a8", "w4,lm_head=w9", "w4,lm_head=w1",
        "w4,0.lm_head=w8", "w4,lm_head=w8,lm_head=w8", "w4,lm_head=nvfp4", "w4,lm_head=w8kv8", "lm_head=w8",
        "w4,embed_tokens", "w4,embed_tokens=w16", "w4,embed_tokens=w9", "w4,embed_tokens=w1", "w4,embed_tokens=w8a8",
        "w4,0.embed_tokens=w8", "w4,embed_tokens=w8,embed_tokens=w8", "w4,embed_tokens=nvfp4", "embed_tokens=w8",
    ],
)  # fmt: skip
def test_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        Scheme.parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) > 10


@pytest.mark.parametrize(
    "site",
    [
        {"readers": ("lm_head",), "weights": None},
        {"readers": ("lm_head", "other")},
        {"readers": ("lm_head",), "right": True},
        {"readers": ("lm_head",), "weights": QuantSpec(bits=8, clip="learned")},
        {"readers": ("lm_head",), "activations": QuantSpec(bits=4, kind="nvfp4")},
    ],
)
def test_an_output_layer_is_one_plain_linear(site: dict) -> None:
    with pytest.raises(SpecError, match="output layer"):
        HeadPlan(site=SitePlan(**{"shape": (1, 8), "weights": QuantSpec(bits=8), **site}))


def test_the_more_specific_override_wins() -> None:
    scheme = Scheme.parse("w4g2a4kv4,1.mlp_mid=w8,mlp_mid=w3a8,attn_in=a16,2.attn_in=w16a6")

    def bits_at(block: int, site: str) -> tuple[int | None, int | None]:
        w, a = scheme.at(block, site)
        return (w.bits if w else None), (a.bits if a else None)

    assert bits_at(0, "mlp_in") == (4, 4)
    assert bits_at(0, "mlp_mid") == (3, 8)
    assert bits_at(1, "mlp_mid") == (8, 8)  # weights from the block's override, activations from the site's
    assert bits_at(11, "mlp_mid") == (3, 8)  # block 1 is not block 11
    assert bits_at(0, "attn_in") == (4, None)
    assert bits_at(2, "attn_in") == (None, 6)
    weights, activations = scheme.at(1, "mlp_mid")
    assert weights == QuantSpec(
        bits=8, group_size=2, clip="learned", clip_start=7.0
    )  # the rest of the grid is the scheme's
    assert activations == QuantSpec(bits=8, clip="learned", clip_start=7.0)


def test_keys_and_values_of_a_block_have_bits_of_their_own() -> None:
    scheme = Scheme.parse("w4a4kv4,0.k8,1.v16,2.kv2,3.k16v3,11.k8,11.v2")

    def bits_at(block: int) -> tuple[int | None, int | None]:
        keys, values = scheme.cache_at(block)
        return (keys.bits if keys else None), (values.bits if values else None)

    found = {block: bits_at(block) for block in (0, 1, 2, 3, 4, 11, 12)}
    assert found == {0: (8, 4), 1: (4, None), 2: (2, 2), 3: (None, 3), 4: (4, 4), 11: (8, 2), 12: (4, 4)}
    assert scheme.cache_at(0)[0] == QuantSpec(bits=8, symmetric=False, clip="learned", clip_start=7.0)
    on = Scheme.parse("w4,1.k3", clip="learned")  # a grid that no other block has
    assert on.cache_at(0) == (None, None)
    assert on.cache_at(1) == (QuantSpec(bits=3, symmetric=False, clip="learned"), None)


@pytest.mark.parametrize("preset, at_four", [("quick", 1.75), ("reference", 4.0), ("best", 4.0)])
def test_clips_start_by_the_bits_of_their_own_grid(preset: str, at_four: float) -> None:
    scheme = flatquant("w4a8k4v8,mlp_mid=w8a4,0.k8,1.v4", preset).scheme
    assert [s and s.clip_start for s in (*scheme.at(0, "attn_in"), *scheme.cache_at(2))] == [at_four, 7.0, at_four, 7.0]
    assert [s and s.clip_start for s in (*scheme.at(0, "mlp_mid"), *scheme.cache_at(0))] == [7.0, at_four, 7.0, 7.0]
    assert [s and s.clip_start for s in scheme.cache_at(1)] == [at_four, at_four]
    on = flatquant("w16,mlp_mid=w8a3,0.k4", preset).scheme  # grids that only an override has
    assert [s and s.clip_start for s in (*on.at(0, "mlp_mid"), on.cache_at(0)[0])] == [7.0, at_four, at_four]


def test_a_fixed_clip_is_not_for_more_bits_than_the_scheme_s() -> None:
    scheme = quarot("w4a4kv4,0.k8,0.v3,mlp_mid=a8").scheme
    keys, values = scheme.cache_at(0)
    assert keys == QuantSpec(bits=8, symmetric=False)
    assert values == QuantSpec(bits=3, symmetric=False, clip="fixed", clip_ratio=0.95)
    assert scheme.at(0, "mlp_mid")[1] == QuantSpec(bits=8)


def test_recipes_from_before_blocks_had_bits_for_their_keys_are_still_read() -> None:
    data = to_dict(FULL)
    del data["scheme"]["cache_overrides"]
    scheme = dataclasses.replace(FULL.scheme, cache_overrides={})
    assert from_dict(Recipe, data) == dataclasses.replace(FULL, scheme=scheme)


@given(
    st.sampled_from([None, "4", "8", "16", *formats.names()]),
    st.sampled_from([None, "4", "16", *formats.names()]),
    st.sampled_from(
        ["", "kv4", "k8v2", *(f"{letters}{name}" for letters in ("kv", "k", "k8v") for name in formats.names())]
    ),
    st.sampled_from([None, *formats.names(), "w4a16", *(f"a{name}" for name in formats.names())]),
)
def test_a_format_stands_where_bits_do(w: str | None, a: str | None, cache: str, override: str | None) -> None:
    head = (f"w{w}" if w else "") + (f"a{a}" if a else "") + cache
    assume(head)
    scheme = Scheme.parse(head + (f",mlp_mid={override}" if override else ""))
    for spec, said in ((scheme.weights, w), (scheme.activations, a)):
        assert (None if spec is None else spec.kind if spec.format else str(spec.bits)) == (
            None if said == "16" else said
        )
    assert Scheme.parse(str(scheme)) == scheme
    assert from_dict(Scheme, json.loads(json.dumps(to_dict(scheme)))) == scheme
    at_mid = scheme.at(0, "mlp_mid")
    assert scheme.at(0, "mlp_in") == (scheme.weights, scheme.activations)
    if override in formats.names():
        assert [spec and spec.kind for spec in at_mid] == [override, override]
    if w in formats.names() and w == a:
        assert Scheme.parse(f"{w}{cache}") == Scheme.parse(head)


def test_bits_in_the_place_of_a_format_are_those_of_the_scheme() -> None:
    """Of an override: integers, whose clip is the scheme's; and back to a format, which has none."""
    learned = Scheme.parse("nvfp4,mlp_mid=w4a8")
    assert learned.at(0, "mlp_mid") == (Scheme.parse("w4").weights, Scheme.parse("a8").activations)
    back = Scheme.parse("w4a4,mlp_mid=nvfp4,0.mlp_mid=a4")
    assert back.at(1, "mlp_mid") == (Scheme.parse("nvfp4").weights, Scheme.parse("nvfp4").activations)
    assert back.at(0, "mlp_mid") == (Scheme.parse("nvfp4").weights, Scheme.parse("a4").activations)
    assert QuantSpec.of("mxfp4", symmetric=True).with_bits(8) == QuantSpec(bits=8)


@pytest.mark.parametrize("name", formats.names())
def test_a_format_of_keys_and_values(name: str) -> None:
    both, apart = Scheme.parse(f"{name}kv{name}"), Scheme.parse(f"w4k{name}v8,1.k4,2.v{name},3.kv{name}")
    want = QuantSpec(bits=4, kind=name, clip="search")
    assert both.keys == both.values == want
    assert apart.cache_at(0) == (want, Scheme.parse("kv8").values)
    assert apart.cache_at(1) == (Scheme.parse("kv4").keys, Scheme.parse("kv8").values)
    assert apart.cache_at(2) == apart.cache_at(3) == (want, want)
    assert apart.named("keys") == apart.named("values") == {name}
    for scheme in (both, apart):
        assert Scheme.parse(str(scheme)) == scheme
        assert from_dict(Scheme, json.loads(json.dumps(to_dict(scheme)))) == scheme


def test_a_format_searches_its_scales_in_the_place_of_a_clip() -> None:
    def clips(scheme: Scheme) -> set[str]:
        return {spec.clip for spec in (scheme.weights, scheme.activations) if spec is not None}

    assert clips(Scheme.parse("nvfp4")) == {"search"}
    assert clips(Scheme.parse("nvfp4", clip="none")) == {"none"}
    assert clips(Scheme.parse("nvfp4", clip="none").with_clips(weights="search", activations=0.9)) == {"search"}
    assert clips(Scheme.parse("nvfp4", clip="none").with_clips(weights="search")) == {"search", "none"}
    assert clips(recipe("rtn", "mxfp4").scheme) == {"none"}  # plain rounding, as other tools know it
    assert clips(recipe("gptq", "mxfp4").scheme) == {"search", "none"}
    assert clips(recipe("flatquant", "mxfp4").scheme) == {"search"}
    with pytest.raises(SpecError, match="no clip but a search"):
        dataclasses.replace(QuantSpec.of("mxfp4", symmetric=True), clip="learned")
    with pytest.raises(SpecError, match="searched clip of integers"):
        Scheme(activations=QuantSpec(bits=4, clip="search"))


def test_what_came_after_format_version_1_is_written_where_it_is_used() -> None:
    """Folders that do without stay byte for byte what they were, and older versions read them."""
    assert "updates_scales" not in to_dict(SolverSpec(kind="gptq"))
    assert "size" not in to_dict(TransformSpec(kind="kronecker"))
    assert "weight_lr" not in to_dict(FitSpec())
    used = FitSpec(weight_lr=1e-3), SolverSpec(kind="gptq", updates_scales=True), TransformSpec(kind="blocks", size=16)
    for spec in used:
        assert from_dict(type(spec), to_dict(spec)) == spec


@pytest.mark.parametrize(
    "given", [{"kind": "blocks"}, {"kind": "kronecker", "size": 16}, {"kind": "blocks", "size": 1}]
)
def test_blocks_and_nothing_else_have_a_size(given: dict) -> None:
    with pytest.raises(SpecError, match="blocks"):
        TransformSpec(**given)


def test_an_override_can_switch_a_grid_on() -> None:
    weights, activations = Scheme.parse("a4,mlp_mid=w8").at(0, "mlp_mid")
    assert weights is not None
    assert activations is not None
    assert (weights.bits, weights.symmetric, activations.bits) == (8, True, 4)


@given(st.integers(2, 8), st.booleans())
def test_integers_of_a_grid(b: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=b, symmetric=symmetric)
    assert spec.high - spec.low == 2**b - 1
    assert spec.low == (-(2 ** (b - 1)) if symmetric else 0)


# ------------------------------------------------------------------------------------------ dictionaries

FULL = Recipe(
    name="all parts",
    scheme=Scheme.parse("w4g32a8k4v2,3.mlp_mid=w8a16,0.k8,3.v16"),
    transforms={
        "attn_in": (
            TransformSpec(kind="diagonal", init="second_moment"),
            TransformSpec(kind="kronecker", init="hadamard"),
        ),
        "qk": (TransformSpec(kind="matrix", parameters="svd", init="orthogonal"),),
    },
    fit=FitSpec(epochs=3, lr=1e-2, warmup_steps=2),
    end_to_end=EndToEndSpec(steps=7, checkpoint=False),
    solver=SolverSpec(kind="gptq", damping=0.1, act_order=True, learned=RoundingSpec(steps=9, reach=0.25)),
    data=DataSpec(samples=8, seqlen=64),
)  # fmt: skip
PLAN = Plan(
    blocks_path="model.layers",
    attention="self_attn",
    blocks=(
        BlockPlan(
            sites={
                "attn_in": SitePlan(
                    readers=("q", "k"), shape=(4, 6), left=True, weights=QuantSpec(bits=4, group_size=2)
                ),
                "mlp_mid": SitePlan(readers=("down",), shape=(1, 7), activations=QuantSpec(bits=3, clip="learned")),
            },
            head_dim=8,
            qk=True,
            keys=QuantSpec(bits=2, symmetric=False),
        ),
        BlockPlan(sites={}, head_dim=8),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [FULL, flatquant(), flatquant("k4v2"), gptq("w3a16"), oac("w2"), vptq("w3"), rtn("w8a8"), PLAN, FULL.scheme]
    + [FULL.solver],
    ids=lambda s: getattr(s, "name", type(s).__name__),
)  # fmt: skip
def test_dictionaries_are_faithful_through_json(spec: Any) -> None:
    data = json.loads(json.dumps(to_dict(spec)))
    assert from_dict(type(spec), data) == spec
    assert to_dict(from_dict(type(spec), data)) == data


def test_defaults_may_be_left_out_and_integers_may_stand_for_floats() -> None:
    assert from_dict(FitSpec, {"epochs": 3, "lr": 1}) == FitSpec(epochs=3, lr=1.0)
    assert isinstance(from_dict(FitSpec, {"lr": 1}).lr, float)


def damage(change: Callable[[dict], Any]) -> Callable[[dict], dict]:
    def apply(data: dict) -> dict:
        change(data)
        return data

    return apply


@pytest.mark.parametrize(
    "change, where",
    [
        (damage(lambda d: d.update(extra=1)), "extra"),
        (damage(lambda d: d["scheme"]["weights"].update(bit=4)), "bit"),
        (damage(lambda d: d["transforms"]["qk"][0].update(seed=4)), "seed"),
        (damage(lambda d: d.pop("name")), "name"),
        (damage(lambda d: d["scheme"]["weights"].pop("bits")), "bits"),
        (damage(lambda d: d.update(name=3)), "name"),
        (damage(lambda d: d.update(scheme="w4")), "scheme"),
        (damage(lambda d: d.update(scheme=None)), "scheme"),
        (damage(lambda d: d.update(transforms=[])), "transforms"),
        (damage(lambda d: d["transforms"].update(qk={})), "qk"),
        (damage(lambda d: d["scheme"]["weights"].update(bits="4")), "bits"),
        (damage(lambda d: d["scheme"]["weights"].update(bits=4.0)), "bits"),
        (damage(lambda d: d["scheme"]["weights"].update(bits=True)), "bits"),
        (damage(lambda d: d["scheme"]["weights"].update(symmetric=1)), "symmetric"),
        (damage(lambda d: d["scheme"]["weights"].update(clip="some")), "clip"),
        (damage(lambda d: d["fit"].update(lr="fast")), "lr"),
        (damage(lambda d: d["fit"].update(lr=True)), "lr"),
        (damage(lambda d: d["solver"].update(kind="awq")), "kind"),
        (damage(lambda d: d["scheme"]["overrides"].update({"mlp_up": {"weights": 8}})), "mlp_up"),
        (damage(lambda d: d["scheme"]["overrides"].update({"mlp_mid": {}})), "without bits"),
        (damage(lambda d: d["scheme"]["cache_overrides"].update({"1.k": {"keys": 8}})), "1.k"),
        (damage(lambda d: d["scheme"]["cache_overrides"].update({"1": {}})), "without bits"),
        (damage(lambda d: d["transforms"].update(mlp_up=[])), "mlp_up"),
        (lambda d: [d], "Recipe"),
        (lambda d: None, "Recipe"),
    ],
)
def test_what_is_no_spec_is_refused_in_one_line(change: Callable[[dict], Any], where: str) -> None:
    data = change(json.loads(json.dumps(to_dict(FULL))))
    with pytest.raises(SpecError, match=where) as caught:
        from_dict(Recipe, data)
    assert "\n" not in str(caught.value)


def test_tuples_of_a_fixed_length_are_checked() -> None:
    with pytest.raises(SpecError, match="2 entries"):
        from_dict(SitePlan, {"readers": ["q"], "shape": [4, 6, 2]})


# ------------------------------------------------------------------------------------------ contradictions

DIAGONAL = TransformSpec(kind="diagonal")
KRON = TransformSpec(kind="kronecker")
MATRIX = TransformSpec(kind="matrix")
LEARNED = Scheme.parse("w4a4")
NONE = Scheme.parse("w4a4", clip="none")


@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantSpec(bits=1),
        lambda: QuantSpec(bits=16),
        lambda: QuantSpec(bits=4, group_size=1),
        lambda: QuantSpec(bits=4, symmetric=False, signed_scale=True),
        lambda: QuantSpec(bits=4, scope="tensor", signed_scale=True),
        lambda: Scheme(activations=QuantSpec(bits=4, signed_scale=True)),
        lambda: Scheme(activations=QuantSpec(bits=4, group_size=128)),
        lambda: Scheme(keys=QuantSpec(bits=4, group_size=128)),
        lambda: Scheme(overrides={"x.mlp_mid": SiteBits(weights=8)}),
        lambda: Scheme(overrides={".mlp_mid": SiteBits(weights=8)}),
        lambda: Scheme(cache_overrides={"01": CacheBits(keys=8)}),
        lambda: SiteBits(),
        lambda: CacheBits(),
        lambda: CacheBits(values=9),
        lambda: vptq("w2a16,0.k8"),
        lambda: TransformSpec(kind="diagonal", init="orthogonal"),
        lambda: TransformSpec(kind="kronecker", init="absmax"),
        lambda: TransformSpec(kind="diagonal", init="absmax", alpha=1.5),
        lambda: FitSpec(epochs=-1),
        lambda: FitSpec(batch_size=0),
        lambda: FitSpec(lr=0.0),
        lambda: FitSpec(lr=float("nan")),
        lambda: FitSpec(clip_lr=-1.0),
        lambda: EndToEndSpec(steps=-1),
        lambda: EndToEndSpec(batch_size=0),
        lambda: EndToEndSpec(lr=0.0),
        lambda: SolverSpec(damping=0.0),
        lambda: SolverSpec(block_size=0),
        lambda: SolverSpec(inputs="original"),
        lambda: SolverSpec(kind="gptq", hessian="output_adaptive", inputs="original"),
        lambda: SolverSpec(kind="codebook", codebook=CodebookSpec(), learned=RoundingSpec()),
        lambda: RoundingSpec(steps=-1),
        lambda: RoundingSpec(batch_size=0),
        lambda: RoundingSpec(reach=0.0),
        lambda: RoundingSpec(checks=0),
        lambda: DataSpec(samples=0),
        lambda: DataSpec(seqlen=1),
        lambda: SitePlan(readers=(), shape=(1, 1)),
        lambda: SitePlan(readers=("q",), shape=(0, 4)),
        lambda: Recipe(name="r", scheme=NONE, transforms={"mlp_up": (KRON,)}),
        lambda: Recipe(name="r", scheme=NONE, transforms={"qk": (KRON,)}),
        lambda: Recipe(name="r", scheme=NONE, transforms={"qk": (MATRIX, MATRIX)}),
        lambda: Recipe(name="r", scheme=NONE, transforms={"mlp_in": (KRON, DIAGONAL)}),
        lambda: Recipe(name="r", scheme=NONE, transforms={"mlp_in": (DIAGONAL, DIAGONAL)}),
        lambda: Recipe(name="r", scheme=NONE, transforms={"mlp_in": (DIAGONAL, KRON, KRON)}),
        lambda: Recipe(name="r", scheme=LEARNED),  # a clip that nothing would fit
        lambda: Recipe(name="r", scheme=NONE, fit=FitSpec(batch_size=9), data=DataSpec(samples=8)),
        lambda: Recipe(name="r", scheme=NONE, end_to_end=EndToEndSpec(steps=1, batch_size=9), data=DataSpec(samples=8)),
        lambda: recipe("awq", "w4"),
        lambda: recipe("rtn", "w4x"),
        lambda: recipe("flatquant", "w4", "slow"),
        lambda: recipe("gptq", "w4", "slow"),
    ],
)
def test_contradictions_are_refused_in_one_line(make: Callable[[], Any]) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, FlatQuantError)


def test_specs_are_frozen_and_keyword_only() -> None:
    spec = QuantSpec(bits=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        QuantSpec(4)  # type: ignore[misc]


@pytest.mark.parametrize(
    "r, needs",
    [
        (rtn("w4a4kv4"), False),
        (gptq("w4"), True),
        (gptq("a4"), False),  # nothing for GPTQ to round
        (autoround("w4"), True),
        (autoround("a4"), False),
        (flatquant("w4"), True),
        (Recipe(name="r", scheme=NONE, transforms={"mlp_in": (KRON,)}), False),
        (Recipe(name="r", scheme=NONE, transforms={"mlp_in": (TransformSpec(kind="diagonal", init="absmax"),)}), True),
        (Recipe(name="r", scheme=NONE, fit=FitSpec(epochs=0)), False),
        (Recipe(name="r", scheme=NONE, end_to_end=EndToEndSpec(steps=1)), True),
    ],
)
def test_data_is_read_only_where_needed(r: Recipe, needs: bool) -> None:
    assert r.needs_data == needs


FEW_BITS = {
    gptq: ((2, False, "search"), (3, False, "search"), (4, True, "search")),
    partial(gptq, authors=True): ((2, False, "none"), (3, False, "none"), (4, True, "none")),
    oac: ((2, False, "search"), (3, False, "search"), (4, True, "none")),
    autoround: ((2, False, "search"), (3, False, "search"), (4, True, "none")),
}


@pytest.mark.parametrize("make", FEW_BITS, ids=["gptq", "the authors' gptq", "oac", "autoround"])
def test_few_bits_get_a_zero_point_and_a_range(make) -> None:
    for bits, symmetric, clip in FEW_BITS[make]:
        weights = make(f"w{bits}g16a8").scheme.weights
        assert (weights.symmetric, weights.clip, weights.group_size) == (symmetric, clip, 16)
    rows = make("w4a16").scheme.weights
    assert rows == QuantSpec(bits=4, signed_scale=make is autoround)  # not searched
    given = Scheme.parse("w2g16a16", clip="none")
    assert make(given).scheme == given


def test_the_best_rounding_is_fitted_end_to_end_and_leaves_ordinary_integers() -> None:
    for bits in (2, 3, 4, 8):
        made = autoround(f"w{bits}g16a16", "best")
        few = bits < 4
        weights = made.scheme.weights
        assert weights is not None
        assert (weights.bits, weights.group_size, weights.clip) == (bits, 16, "learned")
        assert (weights.symmetric, weights.signed_scale) == (not few, not few)
        assert made.end_to_end is not None
        assert made.end_to_end.weight_lr > 0
        assert made.fit is not None
        assert made.fit.weight_lr > 0
        assert not made.transforms
    given = Scheme.parse("w2g16a16", clip="none")
    assert autoround(given, "best").scheme == given
    assert autoround("a8", "best").scheme == Scheme.parse("a8")


def test_gptq_rounds_with_what_measured_best_or_as_its_authors() -> None:
    for bits in (2, 3, 4, 8):
        assert gptq(f"w{bits}a16").solver == SolverSpec(kind="gptq", act_order=True, damping=0.1)
        assert gptq(f"w{bits}a16", authors=True).solver == SolverSpec(kind="gptq")
        assert oac(f"w{bits}a16").solver.act_order == (bits < 4)
    assert not oac(Scheme.parse("w2a16", clip="none")).solver.act_order


# ------------------------------------------------------------------------------------------------- ranks


def test_a_method_for_ranks_has_left_factors_in_blocks_where_ranks_hold_parts() -> None:
    for made in (flatquant("w4a4kv4"), quarot("w4a4kv4")):
        cut = made.for_ranks(4)
        found = {site: {t.ranks for t in parts if t.kind == "kronecker"} for site, parts in cut.transforms.items()}
        assert found["attn_out"] == {4}
        assert set().union(*(found[site] for site in found if site not in ("attn_out", "mlp_mid"))) <= {1}
        assert cut.for_ranks(1) == made
        assert from_dict(Recipe, to_dict(cut)) == cut


def test_ranks_of_what_has_no_left_factor_are_refused() -> None:
    with pytest.raises(SpecError, match="recipe rtn: nothing at attn_out and mlp_mid mixes what ranks hold"):
        rtn("w4a4").for_ranks(2)
    with pytest.raises(SpecError, match="a transform for 0 ranks: at least 1"):
        flatquant("w4a4").for_ranks(0)
    with pytest.raises(SpecError, match="a left factor of 6 rows in 4 blocks"):
        SitePlan(readers=("mlp.down_proj",), shape=(6, 8), left=True, ranks=4)
    with pytest.raises(SpecError, match="a left factor of 6 rows in 2 blocks"):
        SitePlan(readers=("mlp.down_proj",), shape=(6, 8), ranks=2)


def test_a_plan_without_ranks_is_written_as_it_always_was() -> None:
    assert "ranks" not in to_dict(SitePlan(readers=("mlp.down_proj",), shape=(6, 8), left=True))
