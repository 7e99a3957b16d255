"""What a method is made of: transforms, fits, solvers, text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatquant.spec.convert import check, later


@dataclass(frozen=True, kw_only=True)
class TransformSpec:
    """One change of basis on an edge; several compose in order.

    Attributes:
        kind: `shift` (a constant per channel), `diagonal` (per-channel scale), `matrix` (full), `kronecker`
            (P1 (x) P2), `blocks` (I (x) P2: one matrix for every `size` neighbours), `head` (one matrix inside all
            heads, which the heads' writer applies), `heads` (one for every key-value head, likewise).
        parameters: `inverse` trains the matrix itself and inverts it, `svd` trains U diag(d) V^T with U and V in
            Cayley form, so that the inverse is free of a general solve; `rotation` trains an orthogonal matrix by
            Cayley SGD; `fixed` stays at its start, which is orthogonal; `masked` starts at the identity and opens band
            by band, epoch by epoch, all off its diagonal held back by the factor `stability`; `product` trains the two
            matrices of a Kronecker product inside a `matrix` or `blocks`: in blocks of 32, one of 4 and one of 8.
        init: `orthogonal` (Haar), `hadamard` (randomised; a Haar factor where none exists), `identity`. For a diagonal:
            `absmax` is the paper's wmax^(1-alpha) / xmax^alpha, `second_moment` is (E w^2 / E x^2)^(1/4), `identity`.
            For a shift: `center`, the middle between a channel's ends, or `identity`, none.
        alpha: exponent of `absmax`.
        size: of `blocks`, and of nothing else: 16, 32, 64 or 128 are what kernels and formats have. It divides the
            channels of a site. Where heads are written, blocks lie inside heads, and the writer applies them: of a
            size that divides both this one and the heads' own.
        ranks: of a `kronecker`: P1 is block-diagonal in so many blocks. As many ranks of tensor parallelism, or any
            number that divides it, then transform what each holds of the tensor by itself.
    """

    kind: Literal["shift", "diagonal", "matrix", "kronecker", "blocks", "head", "heads"]
    parameters: Literal["inverse", "svd", "rotation", "fixed", "masked", "product"] = "inverse"
    init: Literal["orthogonal", "hadamard", "identity", "absmax", "second_moment", "center"] = "identity"
    alpha: float = 0.3
    stability: float = 0.1
    size: int = later(0)
    ranks: int = later(1)

    def __post_init__(self) -> None:
        check(self.ranks >= 1, f"a transform for {self.ranks} ranks: at least 1")
        check(self.kind == "kronecker" or self.ranks == 1, f"a {self.kind} is not made for ranks: only a kronecker is")
        check((self.kind == "blocks") == (self.size > 0), f"a {self.kind} of size {self.size}: only blocks have one")
        check(self.size != 1, "blocks of 1 change nothing: use a diagonal")
        data = self.init in ("absmax", "second_moment")
        check(self.kind == "diagonal" or not data, f"a {self.kind} transform has no {self.init} start")
        check(self.kind != "diagonal" or data or self.init == "identity", f"a diagonal has no {self.init} start")
        shifted = self.init in ("center", "identity") if self.kind == "shift" else self.init != "center"
        check(shifted, f"a {self.kind} transform has no {self.init} start")
        trains = self.kind not in ("diagonal", "shift") or self.parameters == "inverse"
        check(trains, f"a {self.kind} has no {self.parameters} parameters")
        square = self.kind in ("matrix", "blocks")
        check(self.parameters != "product" or square, f"a {self.kind} has no product for parameters")
        masked = self.parameters == "masked"
        check(self.kind != "heads" or masked, "heads takes masked parameters; use head for one matrix that all share")
        check(not masked or self.init == "identity", f"masked parameters have no {self.init} start")
        check(not masked or self.kind in ("matrix", "head", "heads"), f"a {self.kind} has no masked parameters")
        check(0 < self.stability <= 1, f"stability {self.stability}: above 0, at most 1")
        check(0 <= self.alpha <= 1, f"alpha {self.alpha}: between 0 and 1")


Transforms = tuple[TransformSpec, ...]

# How an end-to-end fit holds the weights; see `EndToEndSpec`.
FitMemory = Literal["full", "compact", "transforms", "sharded"]


@dataclass(frozen=True, kw_only=True)
class FitSpec:
    """Block-wise fit: each block's parameters against the full-precision block's output on the same inputs.

    Loss: mean squared error, divided by its own (detached) value, so that the learning rate has no scale
    (FlatQuant, section 4.1). AdamW.

    Attributes:
        inputs: of the block: `original`, the full-precision model's, or `quantised`, what the quantised blocks before
            it give (targets stay the full-precision model's on its own inputs).
        both_targets: of a fit on quantised inputs: add the error against what the full-precision block gives on the
            quantised inputs (OmniQuant's second term for 2-bit weights).
        schedule: `cosine` per step from `lr` to `lr * final_lr` (the same floor for every group), or `constant`.
        rotation_lr: of rotations, by Cayley SGD.
        code_lr: of weights on levels: of the levels, relative to where they start, and of what decides the codes.
        weight_lr: of the weights before transform and grid; see `EndToEndSpec` (EfficientQAT's first stage, arXiv
            2407.11062).
    """

    epochs: int = 15
    batch_size: int = 4
    lr: float = 5e-3
    clip_lr: float = 5e-2
    weight_decay: float = 0.01
    final_lr: float = 1e-3
    warmup_steps: int = 0
    rotation_lr: float = 1.5
    code_lr: float = 1e-3
    inputs: Literal["original", "quantised"] = "original"
    schedule: Literal["cosine", "constant"] = "cosine"
    both_targets: bool = False
    weight_lr: float = later(0.0)

    def __post_init__(self) -> None:
        check(
            not self.both_targets or self.inputs == "quantised",
            "with original inputs both targets are one: use inputs='quantised'",
        )
        check(self.epochs >= 0, f"epochs {self.epochs}: at least 0")
        check(self.batch_size >= 1, f"batch size {self.batch_size}: at least 1")
        check(self.lr > 0 and self.clip_lr > 0, "learning rates must be positive")


@dataclass(frozen=True, kw_only=True)
class EndToEndSpec:
    """End-to-end fit of the same parameters through all blocks.

    Attributes:
        objective: KL divergence to the original's logits, or cross entropy with the next token of the text.
        round_weights: put weights on their grids while fitting. A solver that compensates rounding errors is better
            served by parameters that were fitted to activations alone (SpinQuant, section 4.3).
        rotation_lr: of rotations, by Cayley SGD.
        code_lr: of weights on levels; see `FitSpec`.
        weight_lr: of the weights before transform and grid, which then train through their rounding as well
            (straight-through), as a share of the root mean square of their site's; 0 leaves them as they are.
        final_lr: where every cosine ends, as a share of `lr` (of `weight_lr` for weights).
        eps: AdamW's, against gradients of the sum over tokens. A larger one holds back parameters whose gradients are
            small, mostly noise when tokens are few.
        checkpoint: where memory is short, compute each block again in the backward pass: a third more time, and
            activations of one block in memory instead of all.
        memory: how weights are held. `full`: in float32, with gradients and AdamW's moments, 16 bytes a weight in
            training and 4 otherwise. `compact`: in 24 bits with moments of 8 bits, each weight's gradient freed as soon
            as it has moved the weight, 5 bytes; it begins from weights rounded to bfloat16, which moves those of models
            in float16 or float32. Weights that do not train are in the model's own 16 bits. `transforms`: no
            weight trains, whatever `weight_lr` says. `sharded`: as `full`, and divided among ranks. `auto`: the first
            of `full`, `compact` and, of several ranks, `sharded` that fits in memory.
    """

    steps: int = 0
    batch_size: int = 2
    lr: float = 1e-3
    clip_lr: float = 1e-2
    weight_lr: float = 0.0
    rotation_lr: float = 1.5
    code_lr: float = 1e-3
    objective: Literal["kl", "cross_entropy"] = "kl"
    round_weights: bool = True
    final_lr: float = 0.0
    eps: float = 1e-8
    checkpoint: bool = True
    memory: Literal[FitMemory, "auto"] = later("full")

    def __post_init__(self) -> None:
        check(self.steps >= 0, f"end-to-end steps {self.steps}: at least 0")
        check(self.batch_size >= 1, f"end-to-end batch size {self.batch_size}: at least 1")
        check(self.lr > 0 and self.clip_lr > 0 and self.weight_lr >= 0, "learning rates must be positive")

    def moves_weights(self, memory: FitMemory) -> bool:
        """Whether weights train, where they are held so."""
        return self.weight_lr > 0 and memory != "transforms"


@dataclass(frozen=True, kw_only=True)
class CodebookSpec:
    """Weights as entries of codebooks: every `length` neighbours of an input column are one vector.

    At b bits a weight, a vector has b * length bits of index: up to `main_bits` for the first codebook, the rest for a
    second one, whose entries are added. Entries come on top.

    Attributes:
        length: of a vector; it divides the number of outputs.
        main_bits: of an index of the first codebook, at most.
        outliers: share of columns, those with the largest curvature, that get a codebook of their own.
        outlier_length, outlier_bits: of that codebook's vectors and indices.
    """

    length: int = 4
    main_bits: int = 8
    outliers: float = 0.0
    outlier_length: int = 2
    outlier_bits: int = 8

    def __post_init__(self) -> None:
        lengths, bits = (self.length, self.outlier_length), (self.main_bits, self.outlier_bits)
        check(all(1 <= v <= 64 for v in lengths), f"vector lengths {lengths}: 1 to 64")
        check(all(1 <= b <= 16 for b in bits), f"index bits {bits}: 1 to 16")
        check(0 <= self.outliers < 1, f"outlier columns {self.outliers}: a share, below 1")

    def index_bits(self, bits: int) -> tuple[int, int]:
        """Bits of the first and of the second index of a vector; 0 where there is no second.

        Raises:
            SpecError: more bits than two codebooks have.
        """
        total = bits * self.length
        check(
            total <= 2 * self.main_bits,
            f"{bits} bits a weight, {total} for a vector of {self.length}: two codebooks of {self.main_bits} have less",
        )
        main = min(total, self.main_bits)
        return main, total - main

    def entries(self, bits: int, vectors: int) -> int:
        """Entries of a codebook: 2^bits, or fewer where each would stand for less than 16 vectors."""
        return max(1, min(1 << bits, vectors // 16))

    def outlier_columns(self, n: int) -> int:
        """How many of n columns have a codebook of their own."""
        return round(self.outliers * n)


@dataclass(frozen=True, kw_only=True)
class RoundingSpec:
    """Rounding that is learned block by block, by signed gradients (AutoRound, arXiv 2309.05516).

    Every weight has an offset, up to half a step of its grid, that is added before rounding, and every scale a factor.
    They start where the solver's rounding is, and train on the quantised block's output error, on the inputs that the
    quantised blocks before give. A step moves each by the sign of its gradient; steps shrink linearly to 0.

    Attributes:
        steps: of the signed gradients; 0 leaves the solver's rounding as it is.
        batch_size: windows in a step; all of them where there are fewer.
        reach: how far an offset, in steps of its grid, and a factor can get from their start in all steps.
        checks: how often the error on all windows is measured on the way; the best of these, and of the start, is kept.
    """

    steps: int = 200
    batch_size: int = 8
    reach: float = 0.5
    checks: int = 4

    def __post_init__(self) -> None:
        check(self.steps >= 0, f"rounding steps {self.steps}: at least 0")
        check(self.batch_size >= 1, f"batch size {self.batch_size} of learned rounding: at least 1")
        check(self.reach > 0, f"reach {self.reach}: must be positive")
        check(self.checks >= 1, f"checks {self.checks}: at least 1")


@dataclass(frozen=True, kw_only=True)
class SolverSpec:
    """How the folded weights are rounded.

    Attributes:
        kind: to nearest (`rtn`), or with every column's error pushed onto those still free, on the scheme's grid
            (`gptq`) or in codebooks of as many bits (`codebook`).
        hessian: what that error costs: `input_gram`, the layer's output error; `output_adaptive`, the model's loss.
        gradients: of `output_adaptive`: one outer product for every sequence, or for every token.
        inputs: of the block, that the Gram matrix is of: what the `quantised` blocks before it give, or the `original`
            model's.
        damping: of the Hessian, relative to its mean diagonal.
        block_size: columns after which the error reaches those outside; a matter of speed alone.
        act_order: columns of large diagonal first; codebooks always do.
        codebook: of the kind `codebook`, and of no other.
        learned: what becomes of that rounding by learning.
        updates_scales: of `gptq` for weights in a format's blocks: a block's scale is found when compensation reaches
            it, and not before.
    """

    kind: Literal["rtn", "gptq", "codebook"] = "rtn"
    hessian: Literal["input_gram", "output_adaptive"] = "input_gram"
    gradients: Literal["sequence", "token"] = "sequence"
    inputs: Literal["quantised", "original"] = "quantised"
    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    codebook: CodebookSpec | None = None
    learned: RoundingSpec | None = None
    updates_scales: bool = later(False)

    def __post_init__(self) -> None:
        in_order = self.kind == "gptq" and not self.act_order
        check(in_order or not self.updates_scales, "only gptq with columns in order updates scales: no act_order")
        check(
            (self.kind == "codebook") == (self.codebook is not None),
            f"the solver {self.kind} " + ("needs a codebook" if self.codebook is None else "uses no codebook"),
        )
        check(
            self.needs_hessian or self.hessian == "input_gram",
            f"the solver {self.kind} uses no Hessian: leave out {self.hessian}, or choose the solver gptq",
        )
        check(self.damping > 0, f"damping {self.damping}: must be positive")
        check(self.block_size >= 1, f"block size {self.block_size}: at least 1")
        grams = self.needs_hessian and self.hessian == "input_gram"
        check(
            grams or self.inputs == "quantised",
            f"the solver {self.kind} with {self.hessian} has no Gram matrix of {self.inputs} inputs",
        )
        check(not self.learns or self.kind != "codebook", "rounding is learned on a grid, which codebooks are not")

    @property
    def needs_hessian(self) -> bool:
        """Whether rounding minds a Hessian."""
        return self.kind != "rtn"

    @property
    def learns(self) -> bool:
        """Whether signed gradients follow."""
        return self.learned is not None and self.learned.steps > 0

    @property
    def needs_data(self) -> bool:
        """Whether rounding reads text."""
        return self.needs_hessian or self.learns


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """A low-rank branch in 16 bit beside every rounded weight: only what it leaves is rounded.

    Attributes:
        rank: of the branch, shared by the readers of a site; no more than the weights have.
        rounds: how often the branch is decomposed anew from what rounding has left; 1 takes it from the weights.
    """

    rank: int = 32
    rounds: int = 1

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"branch rank {self.rank}: at least 1")
        check(self.rounds >= 1, f"branch rounds {self.rounds}: at least 1")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Calibration text: `samples` windows of `seqlen` tokens, of `text` where a run is given no other.

    `text` is written as for `flatquant.data.calibration_tokens`.
    """

    samples: int = 128
    seqlen: int = 2048
    text: str = "wikitext2"

    def __post_init__(self) -> None:
        check(self.samples >= 1 and self.seqlen >= 2, f"{self.samples} x {self.seqlen} tokens: too few to calibrate")
