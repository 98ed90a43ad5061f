# The fast in-place arithmetic of lipschitz_reg.functional against autograd and the readable references, in float64.
# Optimizers and hooks are in test_regularizer.py.

import pytest
import torch
import torch._inductor.config
from torch.utils._python_dispatch import TorchDispatchMode

from lipschitz_reg import Moment, functional


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def make_tensors(dtype, anchor_dtype=None, distance=0.1):
    """Gradients, parameters and anchors of many shapes and layouts; one tensor is longer than a piece."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def layouts():
        return [
            randn(7, 5),
            randn(functional._CPU_BLOCK + 3),
            randn(5, 7).t(),
            randn(4, 6)[:, ::2],
            randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            randn(2, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d),
            randn(()),
            randn(1),
            randn(0, 3),
        ]

    # Rounded to the narrower dtype first, so that anchors of either dtype are the same numbers.
    anchors = [anchor.to(anchor_dtype or dtype) for anchor in layouts()]
    parameters = [(anchor.float() + distance * shift).to(dtype) for anchor, shift in zip(anchors, layouts())]
    gradients = [gradient.to(dtype) for gradient in layouts()]
    return gradients, parameters, anchors


def double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def autograd(parameters, anchors, coefficients):
    """The gradient of the penalty by autograd, in float64."""
    parameters = double(parameters)
    return torch.autograd.grad(functional.penalty(parameters, double(anchors), coefficients), parameters)


def sum_error(terms, dtype=torch.float32):
    """
    How far a sum of so many rounded terms may be off, relative to the sum of their sizes.

    Each step is off by half an eps at most, and n of them by about the square root of n times that (Higham and Mary
    2019, "A new approach to probabilistic rounding error analysis"); 4 is for luck. The order of the sum, which
    processors and libraries choose, does not matter.
    """
    return 4 * terms**0.5 * torch.finfo(dtype).eps / 2


def assert_rounded(actual, expected, sizes, terms=4):
    """
    Equal up to one rounding in the dtype of `actual`, after sums of so many terms in float32 or wider. `sizes` are
    those of `expected` if all that is summed had the same sign. 4 terms are a few operations on each element.
    """
    for a, e, size in zip(actual, expected, sizes, strict=True):
        # The reference is rounded too, which counts where both are float64.
        wide = torch.promote_types(a.dtype, torch.float32)
        bound = size * (sum_error(terms, wide) + sum_error(terms, torch.float64))
        info = torch.finfo(a.dtype)
        bound = bound + info.eps / 2 * (e.abs() + bound) + info.tiny
        assert bool(((a.double() - e).abs() <= bound).all()), ((a.double() - e).abs() / bound).max()


def sums(*addends):
    """Element by element, the sums and the sums of the sizes."""
    rows = list(zip(*addends, strict=True))
    return [sum(row) for row in rows], [sum(part.abs() for part in row) for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_gradient_equals_autograd(dtype):
    gradients, parameters, anchors = make_tensors(dtype)
    coefficients = [0.1 * (i + 1) for i in range(len(parameters))]
    expected, sizes = sums([g.double() for g in gradients], autograd(parameters, anchors, coefficients))
    functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients)
    assert_rounded(gradients, expected, sizes)


def assert_terms(actual, parameters, anchors, coefficients):
    """Those of the penalty, of the wide dtype and no dimensions."""
    for term, p, a, c in zip(actual, double(parameters), double(anchors), coefficients, strict=True):
        assert term.dim() == 0 and term.dtype.itemsize >= 4
        expected = functional.penalty([p], [a], [c])
        assert_rounded([term], [expected], [expected], p.numel() + 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["number", "no dimensions", "a row each"])
def test_penalty_comes_from_the_pass_that_adds_its_gradient(dtype, kind):
    """As what sums up to it."""
    gradients, parameters, anchors = make_tensors(dtype)
    coefficients = [0.1 * (i + 1) for i in range(len(parameters))]
    if kind == "no dimensions":
        coefficients = [torch.tensor(c) for c in coefficients]
    if kind == "a row each":
        coefficients = [torch.full(p.shape[:1] + (1,) * (p.dim() - 1), c) for p, c in zip(parameters, coefficients)]
    terms = functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients)
    assert all(term.dim() == 0 and term.dtype.itemsize >= 4 for term in terms)
    total, expected = torch.stack(terms).sum(), functional.penalty(double(parameters), double(anchors), coefficients)
    assert_rounded([total], [expected], [expected], sum(p.numel() for p in parameters))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pull_returns_the_square_of_the_distance_before_it(dtype):
    _, parameters, anchors = make_tensors(dtype)
    before = [parameter.clone() for parameter in parameters]
    squares = [functional.pull_(p, a, 0.25) for p, a in zip(parameters, anchors, strict=True)]
    assert_terms(squares, before, anchors, [1.0] * len(before))


@pytest.mark.parametrize("anchor_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", ["gradient", "proximal", "projected"])
def test_anchor_in_fewer_bytes_gives_the_same_bits(anchor_dtype, step):
    results = []
    for widen in (False, True):
        gradients, parameters, anchors = make_tensors(torch.float32, anchor_dtype)
        anchors = [anchor.float() for anchor in anchors] if widen else anchors
        if step == "gradient":
            functional.add_penalty_gradient_(gradients, parameters, anchors, [0.3] * len(parameters))
        elif step == "proximal":
            functional.proximal_step_(parameters, anchors, [0.3] * len(parameters))
        else:
            functional.project_(parameters, anchors, 1.0)
        results.append(gradients + parameters)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_gradient_keeps_its_digits_near_the_anchor(dtype):
    anchor = torch.linspace(1, 1.5, 1000).to(dtype)
    parameter = anchor + torch.finfo(dtype).eps  # a single unit in the last place away
    gradient = torch.zeros(1000, dtype=dtype)
    functional.add_penalty_gradient_([gradient], [parameter], [anchor], [1000.0])
    (expected,) = autograd([parameter], [anchor], [1000.0])
    assert_rounded([gradient], [expected], [expected.abs()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_anchor_nothing_changes_a_bit(dtype):
    gradients, parameters, _ = make_tensors(dtype)
    anchors = [parameter.clone() for parameter in parameters]
    before = [tensor.clone() for tensor in gradients + parameters]
    functional.add_penalty_gradient_(gradients, parameters, anchors, [500.0] * len(parameters))
    functional.proximal_step_(parameters, anchors, [500.0] * len(parameters))
    functional.project_(parameters, anchors, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(gradients + parameters, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficient", [1e-4, 0.3, 20.0, 1e9])
def test_proximal_step_equals_reference(dtype, coefficient):
    _, parameters, anchors = make_tensors(dtype)
    coefficients = [coefficient] * len(parameters)
    expected = functional.proximal_step(double(parameters), double(anchors), coefficients)
    sizes = sums(double(parameters), double(anchors))[1]
    functional.proximal_step_(parameters, anchors, coefficients)
    assert_rounded(parameters, expected, sizes)


def test_proximal_step_minimizes_its_objective():
    _, parameters, anchors = make_tensors(torch.float64)
    points = double(functional.proximal_step(parameters, anchors, [0.7] * len(parameters)))
    distances = functional.penalty(points, parameters, [0.5] * len(points))
    objective = distances + functional.penalty(points, anchors, [0.7] * len(points))
    slopes = torch.autograd.grad(objective, points)
    zeros = [torch.zeros_like(slope) for slope in slopes]
    assert_rounded(slopes, zeros, sums(points, parameters, anchors)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_equals_reference(dtype):
    _, parameters, anchors = make_tensors(dtype)
    expected = functional.project(double(parameters), double(anchors), 3.0)
    sizes, terms = sums(double(parameters), double(anchors))[1], sum(p.numel() for p in parameters)
    functional.project_(parameters, anchors, 3.0)
    assert_rounded(parameters, expected, sizes, terms)


def test_projection_ends_on_the_ball_around_all_anchors_together():
    _, parameters, anchors = make_tensors(torch.float32)
    functional.project_(parameters, anchors, 3.0)
    distance = functional.penalty(double(parameters), double(anchors), [1.0] * len(parameters)).sqrt().item()
    assert distance == pytest.approx(3.0, rel=sum_error(sum(p.numel() for p in parameters)))


def test_projection_leaves_what_is_inside_the_ball():
    _, parameters, anchors = make_tensors(torch.float32)
    before = [parameter.clone() for parameter in parameters]
    functional.project_(parameters, anchors, 1e6)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_distances_equal_float64(dtype):
    _, parameters, anchors = make_tensors(dtype)
    actual = functional.squared_distances(parameters, anchors)
    expected = [functional.penalty([p], [a], [1.0]) for p, a in zip(double(parameters), double(anchors))]
    for a, e, p in zip(actual, expected, parameters, strict=True):
        wide = torch.promote_types(dtype, torch.float32)
        assert a.dtype == wide and a.item() == pytest.approx(e.item(), rel=sum_error(p.numel() + 4, wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["no dimensions", "an element each", "a row each"])
def test_coefficients_may_be_tensors(dtype, kind):
    gradients, parameters, anchors = make_tensors(dtype)
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "no dimensions": lambda p: (),
        "an element each": lambda p: p.shape,
        "a row each": lambda p: p.shape[:1] + (1,) * (p.dim() - 1),
    }
    coefficients = [torch.rand(shapes[kind](p), generator=generator, dtype=torch.float64) for p in parameters]
    expected, sizes = sums([g.double() for g in gradients], autograd(parameters, anchors, coefficients))
    functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients)
    assert_rounded(gradients, expected, sizes)
    expected = functional.proximal_step(double(parameters), double(anchors), coefficients)
    sizes = sums(double(parameters), double(anchors))[1]
    functional.proximal_step_(parameters, anchors, coefficients)
    assert_rounded(parameters, expected, sizes)


def test_float16_gradient_saturates_and_passes_overflow_on():
    gradient = torch.tensor([60000.0, -60000.0, 1.0, float("inf"), float("-inf")], dtype=torch.float16)
    parameter = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float16)
    functional.add_penalty_gradient_([gradient], [parameter], [torch.zeros_like(parameter)], [10000.0])
    assert gradient.tolist() == [65504.0, -65504.0, 20000.0, float("inf"), float("-inf")]


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest memory block that any operation allocates."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("anchor_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_are_no_larger_than_a_piece(dtype, anchor_dtype):
    parameters = [torch.randn(4 * functional._CPU_BLOCK).to(dtype), torch.randn(8, 8).to(dtype)]
    anchors = [torch.zeros_like(parameter, dtype=anchor_dtype) for parameter in parameters]
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    with LargestTensor(parameters + anchors + gradients) as largest:
        functional.add_penalty_gradient_(gradients, parameters, anchors, [0.1, 0.1])
        functional.proximal_step_(parameters, anchors, [0.1, 0.1])
        functional.project_(parameters, anchors, 1.0)
    assert 0 < largest.bytes <= 4 * functional._CPU_BLOCK


class Operations(TorchDispatchMode):
    """
    Counts what torch is asked to compute; on an accelerator each is a launch, or a few for a list of any length. Views
    are none.
    """

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("step", ["gradient", "scaled gradient", "layers", "proximal", "projected"])
def test_operations_do_not_grow_with_the_number_of_small_tensors(step):
    counts = []
    for number in (20, 200):
        parameters = [torch.ones(3 + index % 2, 5) for index in range(number)]
        anchors, gradients = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        coefficients = [0.1 / p.numel() for p in parameters]
        moments = [Moment(torch.ones(5, 2), torch.tensor(0.5)) for _ in parameters]
        with Operations() as operations:
            if step == "layers":
                functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients, moments)
            elif step == "gradient":
                functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients)
            elif step == "scaled gradient":
                scale = torch.tensor(4.0)
                functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients, scale=scale)
            elif step == "proximal":
                functional.proximal_step_(parameters, anchors, coefficients)
            else:
                functional.pull_all_(parameters, anchors, [torch.tensor(0.5)] * number, measured=False)
        counts.append(operations.count)
    assert counts[0] == counts[1] < (60 if step == "layers" else 20)  # of each shape as many


@pytest.mark.parametrize("scale", [1.0, 8.0, torch.tensor(8.0)], ids=["", "number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_small_parameters_of_one_shape_that_have_moments_equal_autograd(dtype, scale):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    shapes = [(4, 3, 2, 2)] * 3 + [(5, 12)] * 2
    parameters, anchors, gradients = ([randn(*shape).to(dtype) for shape in shapes] for _ in range(3))
    parameters[1] = parameters[1].to(memory_format=torch.channels_last)
    moments = [Moment(randn(12, 2), torch.tensor(0.1 * (1 + index))) for index in range(5)]
    coefficients, before = [0.1, 0.2, 0.3, 0.4, 0.5], [gradient.double().clone() for gradient in gradients]
    terms = functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients, moments, scale)
    assert len(terms) == 2  # together, by shape
    points = double(parameters)
    penalty = functional.penalty(points, double(anchors), coefficients, moments)
    changes = torch.autograd.grad(penalty, points)
    torch.testing.assert_close(torch.stack(terms).sum().double(), penalty.detach(), rtol=1e-4, atol=0)
    eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else torch.finfo(torch.float32).eps
    for gradient, start, change in zip(gradients, before, changes, strict=True):
        torch.testing.assert_close(gradient.double(), start + float(scale) * change, rtol=8 * eps, atol=64 * eps)


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_gradient_is_that_of_the_unscaled_penalty_times_the_scale(dtype, kind):
    """As a `GradScaler` needs it; what is returned stays unscaled."""
    gradients, parameters, anchors = make_tensors(dtype)
    coefficients, scale = [0.1 * (i + 1) for i in range(len(parameters))], 8.0
    own = [scale * gradient for gradient in autograd(parameters, anchors, coefficients)]
    expected, sizes = sums([g.double() for g in gradients], own)
    given = torch.tensor(scale, dtype=torch.float64) if kind == "tensor" else scale
    terms = functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients, scale=given)
    assert_rounded(gradients, expected, sizes)
    penalty = functional.penalty(double(parameters), double(anchors), coefficients)
    torch.testing.assert_close(torch.stack(terms).sum().double(), penalty, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "reduction, factors", [("sum", [1, 1, 1]), ("tensor_mean", [1 / 2, 1 / 6, 1]), ("mean", [1 / 8, 1 / 8, 1 / 8])]
)
def test_reductions_are_means_over_what_they_say(reduction, factors):
    assert functional.reductions([2, 6, 0], reduction) == factors


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="sum, tensor_mean, mean, not 'average'"):
        functional.reductions([1], "average")
