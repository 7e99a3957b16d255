"""To and from other tools: the original project's matrices in, compressed-tensors and plain checkpoints out.

- `import_matrices`: `flat_matrices.pth` of github.com/ruikangliu/FlatQuant, by torch's weights-only reader. Their
  transforms, scales and clips mean what ours do; only that they clip the input of q, k and v (gate and up) three times
  (twice), and we once: the means of their logits are taken, and the largest difference is reported.
- `export_compressed`: results without online transforms, as compressed-tensors, which vLLM and transformers load:
  integers without grids for activations as `pack-quantized`, FP4 with or without them as `nvfp4-pack-quantized` and
  `mxfp4-pack-quantized`. (Results of RTN and GPTQ. Its `transform_config` has a place for
  matrices, but transformers ignores it; models with FlatQuant's transforms are refused.)
- `import_compressed`: FP4 models in these formats, with the same codes and scales.
- `export_dense`: an ordinary checkpoint with the rounded weights as numbers, in the original basis: x P Q(W P^-T)^T =
  x (Q(W P^-T) P^T)^T. For any tool. It knows nothing of grids for activations, keys and values.
"""

from flatquant.interchange.compressed_in import import_compressed
from flatquant.interchange.compressed_out import export_compressed
from flatquant.interchange.dense import export_dense
from flatquant.interchange.original import import_matrices, read_matrices

__all__ = ["export_compressed", "export_dense", "import_compressed", "import_matrices", "read_matrices"]
