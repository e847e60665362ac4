"""Plain float64 definitions of what the heads' kernels compute, and checks that run on any device, in any process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ove.heads import triton_backend
from megatron_ove.heads.margin_softmax import MarginSoftmax

BETA1, BETA2, EPSILON, WEIGHT_DECAY, LR, FACTOR = 0.8, 0.95, 1e-6, 0.3, 0.05, 0.7


@dataclass(frozen=True)
class Sizes:
    """a active rows, `padding` of them padding; b samples in `columns` (None = b); e components, s sets, k labels."""

    a: int
    b: int
    e: int
    s: int = 3
    k: int = 4
    padding: int = 3
    spare_classes: int = 11
    columns: int | None = None


@dataclass(frozen=True)
class Problem:
    """One microbatch against the active rows of a table; see `triton_backend.statistics` for shapes."""

    x: Tensor
    table: Tensor
    rows: Tensor
    norms: Tensor
    weights: Tensor
    targets: Tensor
    softmax: MarginSoftmax
    grad_sums: Tensor
    grad_targets: Tensor
    compute_dtype: torch.dtype
    columns: int
    gathered: Tensor | None = None

    @property
    def tolerance(self) -> float:
        """Relative to the norm of a result. bf16: the operands are rounded alike in the definition, so what remains is
        the rounding of exponentials and coefficients to 8 bits and of cosines to 11."""
        return 8e-3 if self.compute_dtype == torch.bfloat16 else 2e-5

    def directions(self) -> Tensor:
        """Normalized active rows as the product sees them, [a, e] float64."""
        if self.gathered is not None:
            return self.gathered.double()
        return self.table[self.rows].to(self.compute_dtype).double() / self.norms[self.rows].double()[:, None]

    def source(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the kernels read rows from."""
        return (self.table, self.rows, self.norms) if self.gathered is None else (self.gathered, None, None)

    def operand(self) -> Tensor:
        return self.x.to(self.compute_dtype).double()


def make_problem(
    sizes: Sizes,
    *,
    device: str = "cpu",
    filter_mode: Literal["zero", "mask", "off"] = "zero",
    compute_dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
    logit_scale: float = 16.0,
    seed: int = 0,
) -> Problem:
    """Embeddings near their labels' rows; repeated labels, neighbouring ones, missing ones; padding rows at the end."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device}
    a, b, e, s, k, padding = sizes.a, sizes.b, sizes.e, sizes.s, sizes.k, min(sizes.padding, sizes.a)
    num_rows, real = a - padding + sizes.spare_classes, a - padding
    spread = 0.5 + torch.rand(num_rows + 1, 1, **options)
    table = (torch.randn(num_rows + 1, e, **options) * spread).to(compute_dtype).to(table_dtype)
    rows = torch.randperm(num_rows, **options)[:real].sort().values
    rows = torch.cat([rows, rows.new_full((padding,), num_rows)])
    weights = (torch.rand(a, s, **options) < 0.6) * torch.where(torch.rand(a, s, **options) < 0.5, 1.0, 3.3)
    weights[real:] = 0
    targets = torch.randint(-1, max(real, 1), (k, b), **options) if real else torch.full((k, b), -1, device=device)
    if k > 2:
        targets[1] = torch.where(torch.arange(b, device=device) % 2 == 0, targets[0], targets[1])
        targets[2] = torch.where(targets[0] > 0, targets[0] - 1, targets[2])
    near = torch.where(targets[:1] >= 0, 0.8, 0.0).T * table[rows[targets[0].clamp(min=0)]].float() if a and k else 0.0
    x = torch.nn.functional.normalize(near + torch.randn(b, e, **options), dim=1)
    problem = Problem(
        x=x,
        table=table,
        rows=rows,
        norms=torch.linalg.vector_norm(table.float(), dim=1),
        weights=weights,
        targets=targets,
        softmax=MarginSoftmax("cosface", 0.3, logit_scale, 2.0, "zero", "negative"),
        grad_sums=torch.rand(s, b, **options) / logit_scale,
        grad_targets=-torch.rand(k, b, **options) * logit_scale,
        compute_dtype=compute_dtype,
        columns=sizes.columns or b,
    )
    if filter_mode == "off":
        return problem
    softmax = replace(problem.softmax, interclass_filter=_threshold(problem), interclass_filter_mode=filter_mode)
    return replace(problem, softmax=softmax)


def _threshold(problem: Problem) -> float:
    """Halfway in the widest gap of the largest cosines, where no rounding decides for another side."""
    cosines = (problem.directions() @ problem.operand().T).flatten().sort().values
    if cosines.numel() < 20:
        return 0.5
    top = cosines[-(cosines.numel() // 10) : -cosines.numel() // 50]
    gaps = top.diff()
    return float(top[gaps.argmax()] + gaps.max() / 2) if gaps.numel() else 0.5


def plain_statistics(problem: Problem, cosines: Tensor) -> tuple[Tensor, Tensor]:
    """(sums [s, b], cosines with labels [k, b]) of cosines [a, b], float64."""
    softmax, targets = problem.softmax, problem.targets
    exponentials = (softmax.logit_scale * cosines).exp()
    if softmax.interclass_filter < 1:
        value = 1.0 if softmax.interclass_filter_mode == "zero" else 0.0
        exponentials = torch.where(cosines > softmax.interclass_filter, value, exponentials)
    own = torch.zeros(cosines.shape[0] + 1, cosines.shape[1], dtype=torch.bool, device=cosines.device)
    own.scatter_(0, targets.where(targets >= 0, cosines.shape[0]), True)
    sums = problem.weights.double().T @ exponentials.masked_fill(own[:-1], 0.0)
    padded = torch.cat([cosines, cosines.new_zeros(1, cosines.shape[1])])
    return sums, padded.gather(0, targets.where(targets >= 0, cosines.shape[0]))


@dataclass(frozen=True)
class Gradients:
    """Of sum(sums * grad_sums) + sum(target_cosines * grad_targets): by autograd in float64."""

    coefficients: Tensor
    embeddings: Tensor
    directions: Tensor
    radial: Tensor


def plain_gradients(problem: Problem) -> Gradients:
    """Gradients with respect to cosines, embeddings and directions, and coefficient * cosine summed over samples."""
    x, directions = problem.operand().requires_grad_(), problem.directions().requires_grad_()
    cosines = directions @ x.T
    cosines.retain_grad()
    sums, target_cosines = plain_statistics(problem, cosines)
    ((sums * problem.grad_sums).sum() + (target_cosines * problem.grad_targets).sum()).backward()
    grads = (tensor.grad for tensor in (cosines, x, directions))
    of_cosines, of_x, of_directions = (torch.zeros(0) if grad is None else grad for grad in grads)
    return Gradients(of_cosines, of_x, of_directions, (of_cosines * cosines.detach()).sum(1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30)) if actual.numel() else 0.0


def run_statistics(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(sums, target cosines, cosines [a, b] as columns of a larger buffer, as with several microbatches)."""
    shape = (problem.rows.numel(), problem.columns + 32)
    buffer = torch.full(shape, 9.0, dtype=problem.compute_dtype, device=problem.x.device)[:, 16:-16]
    arguments = (problem.weights, problem.targets, problem.softmax, buffer)
    found = triton_backend.statistics(problem.x, *problem.source(), *arguments, compute_dtype=problem.compute_dtype)
    return *found, buffer


def run_gradients(problem: Problem, buffer: Tensor, radial: Tensor) -> Tensor:
    """The gradient of the embeddings; `buffer` turns from cosines into coefficients."""
    return triton_backend.gradients(
        *problem.source(),
        *(problem.weights, problem.targets, problem.softmax, buffer),
        *(problem.grad_sums, problem.grad_targets, radial),
        compute_dtype=problem.compute_dtype,
    )


def check_statistics_and_gradients(sizes: Sizes, *, directions: bool = False, **options: Any) -> None:
    """Kernels against the definition; neighbouring columns of the buffer must stay as they were."""
    problem = make_problem(sizes, **options)
    if directions:
        gathered = triton_backend.gather_directions(problem.table, problem.rows, problem.norms, problem.compute_dtype)
        assert ((gathered - problem.directions()).abs() <= 2**-7 * problem.directions().abs()).all()
        problem = replace(problem, gathered=gathered)
    expected_sums, expected_targets = plain_statistics(problem, problem.directions() @ problem.operand().T)
    sums, target_cosines, buffer = run_statistics(problem)
    assert ((sums.double() - expected_sums).abs() <= problem.tolerance * expected_sums.abs() + 1e-30).all()
    assert relative_error(target_cosines, expected_targets) < problem.tolerance
    wanted = plain_gradients(problem)
    before = torch.rand(sizes.a, device=problem.x.device)
    radial = before.clone()
    of_x = run_gradients(problem, buffer, radial)
    assert relative_error(buffer[:, : sizes.b], wanted.coefficients) < problem.tolerance
    assert not buffer[:, sizes.b :].any() or sizes.b == 0
    assert relative_error(of_x, wanted.embeddings) < problem.tolerance
    assert relative_error(radial - before, wanted.radial) < problem.tolerance
    whole = buffer._base if buffer._base is not None else buffer
    assert (whole[:, :16] == 9).all()
    assert (whole[:, -16:] == 9).all()
    is_own = problem.targets >= 0
    if sizes.a and is_own.any():  # the large ones on their own: the norm of all would hide an error there
        places = problem.targets.clamp(min=0)
        found, right = (t.gather(0, places)[is_own] for t in (buffer.double(), wanted.coefficients))
        assert relative_error(found, right) < problem.tolerance


def check_weights_keep_their_digits(sizes: Sizes, **options: Any) -> None:
    """Where every exponential is 1, sums are sums of weights: 1 / probability is not rounded to bf16."""
    problem = make_problem(sizes, filter_mode="off", **options)
    problem = replace(problem, x=torch.zeros_like(problem.x), targets=torch.full_like(problem.targets, -1))
    sums = run_statistics(problem)[0]
    assert relative_error(sums, problem.weights.sum(0)[:, None].expand_as(sums)) < 2e-5


def check_square_norms(sizes: Sizes, **options: Any) -> None:
    """Squared norms of the tangential gradient, from the Gram matrix."""
    problem = make_problem(sizes, **options)
    wanted = plain_gradients(problem)
    coefficients = wanted.coefficients.to(problem.compute_dtype)
    x = problem.operand()
    product = coefficients.double() @ x
    radial = (coefficients.double() * (problem.directions() @ x.T)).sum(1)
    result = triton_backend.square_norms(
        coefficients, (x @ x.T).float(), radial.float(), compute_dtype=problem.compute_dtype
    )
    expected = product.square().sum(1) - radial.square()
    scale = product.square().sum(1)
    assert ((result - expected).abs() <= 1e-4 * scale + 1e-12).all()
    assert relative_error(result, expected) < 1e-3


def check_accumulate(sizes: Sizes, **options: Any) -> None:
    """The dense gradient of the directions is added to."""
    problem = make_problem(sizes, **options)
    coefficients = plain_gradients(problem).coefficients.to(problem.compute_dtype)
    before = torch.randn(sizes.a, sizes.e, device=problem.x.device)
    total = before.clone()
    triton_backend.accumulate(total, coefficients, problem.x, compute_dtype=problem.compute_dtype)
    expected = coefficients.double() @ problem.operand()
    assert relative_error(total - before, expected) < 1e-5 * (1 + float(before.norm() / expected.norm()))


@dataclass
class Optimizer:
    """The table and its moments after some updates, and this step's gradient."""

    table: Tensor
    norms: Tensor
    mean: Tensor | None
    square: Tensor
    steps: Tensor
    gradient: Tensor
    x: Tensor | None
    radial: Tensor
    square_norms: Tensor | None
    row_noise: Tensor | None
    column_noise: Tensor | None


def make_optimizer(
    problem: Problem, *, first_moment: torch.dtype | None, by_element: bool, factored: bool, dithers: bool
) -> Optimizer:
    """Moments as after 0 to 5 updates of each row."""
    generator = torch.Generator(problem.x.device).manual_seed(5)
    options: dict[str, Any] = {"generator": generator, "device": problem.x.device}
    (num_rows, size), num_active = problem.table.shape, problem.rows.numel()
    coefficients = plain_gradients(problem).coefficients.to(problem.compute_dtype)
    product = coefficients.double() @ problem.operand()
    radial = (product * problem.directions()).sum(1)
    square_norms = (product.square().sum(1) - radial.square()).clamp(min=0)
    square_norms *= FACTOR**2 / problem.norms[problem.rows].square()
    moment = torch.randn(num_rows, size, **options)
    return Optimizer(
        table=problem.table.clone(),
        norms=problem.norms.clone(),
        mean=None if first_moment is None else moment.to(first_moment),
        square=torch.rand(num_rows, size if by_element else 1, **options),
        steps=torch.randint(0, 6, (num_rows,), dtype=torch.int32, **options),
        gradient=coefficients if factored else product.float(),
        x=problem.x if factored else None,
        radial=radial.float(),
        square_norms=None if by_element else square_norms.float(),
        row_noise=torch.randint(-(2**31), 2**31, (num_active,), **options).int() if dithers else None,
        column_noise=torch.randint(-(2**31), 2**31, (size,), **options).int() if dithers else None,
    )


def run_update(problem: Problem, state: Optimizer) -> None:
    """One update in place."""
    triton_backend.update_rows(
        *(state.table, state.norms, state.mean, state.square, state.steps, problem.rows, state.gradient, state.x),
        *(state.radial, state.square_norms, torch.tensor(FACTOR, device=problem.x.device)),
        lr=LR,
        beta1=BETA1,
        beta2=BETA2,
        epsilon=EPSILON,
        weight_decay=WEIGHT_DECAY,
        row_noise=state.row_noise,
        column_noise=state.column_noise,
        compute_dtype=problem.compute_dtype,
    )


def plain_update(problem: Problem, state: Optimizer) -> tuple[Tensor, Tensor | None, Tensor]:
    """(rows before they are rounded, mean, square) of the real active rows after AdamW, in float64."""
    real = problem.rows < problem.table.shape[0] - 1
    rows = problem.rows[real]
    product = state.gradient.double() if state.x is None else state.gradient.double() @ problem.operand()
    norms = problem.norms[rows].double()[:, None]
    w = problem.table[rows].double()
    gradient = FACTOR / norms * (product[real] - state.radial[real].double()[:, None] / norms * w)
    count = state.steps[rows].double()[:, None] + 1
    by_row = state.square.shape[1] == 1
    squares = gradient.square().mean(1, keepdim=True) if by_row else gradient.square()
    square = state.square[rows].double()
    square = square + (1 - BETA2) / (1 - BETA2**count) * (squares - square)
    mean = None if state.mean is None else state.mean[rows].double()
    if mean is not None:
        mean = mean + (1 - BETA1) / (1 - BETA1**count) * (gradient - mean)
    w = w * (1 - LR * WEIGHT_DECAY) - LR * (gradient if mean is None else mean) / (square.sqrt() + EPSILON)
    return w, mean, square


def check_update(
    sizes: Sizes,
    *,
    first_moment: torch.dtype | None = torch.float32,
    by_element: bool = True,
    factored: bool = True,
    dithers: bool = False,
    **options: Any,
) -> None:
    """AdamW of the active rows; all other rows, the spare one too, keep every bit."""
    problem = make_problem(sizes, **options)
    state = make_optimizer(
        problem, first_moment=first_moment, by_element=by_element, factored=factored, dithers=dithers
    )
    before = replace(state, **{key: value.clone() for key, value in vars(state).items() if value is not None})
    w, mean, square = plain_update(problem, before)
    run_update(problem, state)
    rows = problem.rows[problem.rows < problem.table.shape[0] - 1]
    assert relative_error(state.square[rows], square) < 1e-4
    if state.mean is not None and mean is not None:
        assert relative_error(state.mean[rows], mean) < (1e-5 if state.mean.dtype == torch.float32 else 8e-3)
    stored = state.table[rows].double()
    if state.table.dtype == torch.float32:
        assert relative_error(stored, w) < 1e-5
    elif dithers:
        check_dithered(problem, state, stored, w)
    else:
        assert ((stored - w).abs() <= 2**-7 * w.abs() + 1e-5).all()
    assert relative_error(state.norms[rows], torch.linalg.vector_norm(stored, dim=1)) < 1e-6
    assert torch.equal(state.steps[rows], before.steps[rows] + 1)
    idle = torch.ones(problem.table.shape[0], dtype=torch.bool, device=rows.device).index_fill(0, rows, False)
    for key in ("table", "norms", "mean", "square", "steps"):
        if getattr(state, key) is not None:
            assert torch.equal(getattr(state, key)[idle], getattr(before, key)[idle]), key


def check_dithered(problem: Problem, state: Optimizer, stored: Tensor, w: Tensor) -> None:
    """Noise added below the kept bits, then cut: equal to that in fp32 but where w lies at the edge of two results."""
    assert state.row_noise is not None
    assert state.column_noise is not None
    real = problem.rows < problem.table.shape[0] - 1
    noise = (state.row_noise[real][:, None] ^ state.column_noise) & 0xFFFF
    wanted = ((w.float().view(torch.int32) + noise) & -0x10000).view(torch.float32)
    assert (stored != wanted).double().mean() < 0.02
    assert ((stored - w).abs() <= 2**-7 * w.abs() + 1e-5).all()


def all_results(sizes: Sizes, **options: Any) -> list[Tensor]:
    """Results of every kernel, for two runs to be compared bit by bit."""
    problem = make_problem(sizes, **options)
    sums, target_cosines, buffer = run_statistics(problem)
    radial = torch.zeros(sizes.a, device=problem.x.device)
    of_x = run_gradients(problem, buffer, radial)
    x = torch.nn.functional.pad(problem.x, (0, 0, 0, problem.columns - sizes.b))
    gram = x @ x.T
    squares = triton_backend.square_norms(buffer, gram, radial, compute_dtype=problem.compute_dtype)
    state = make_optimizer(problem, first_moment=torch.float32, by_element=False, factored=True, dithers=False)
    state.gradient, state.x, state.radial, state.square_norms = buffer, x, radial, squares
    run_update(problem, state)
    moments = [tensor for tensor in (state.table, state.norms, state.mean, state.square) if tensor is not None]
    return [sums, target_cosines, buffer.clone(), radial, of_x, squares, *moments]


def check_determinism(sizes: Sizes, **options: Any) -> None:
    """Two runs give the same bits."""
    for first, second in zip(all_results(sizes, **options), all_results(sizes, **options), strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
