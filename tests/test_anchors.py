# Anchors give back every bit of the weights they were taken from, and fingerprints tell them apart.
# What is done with them is in test_functional.py and test_regularizer.py.
import pytest
import torch

from lipschitz_reg.anchors import fingerprint, make_anchor, smallest_lossless_dtype


try:
    from torch.distributed.tensor import distribute_tensor
except ImportError:  # before torch 2.5
    from torch.distributed._tensor import distribute_tensor


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """Code that torch.compile makes, as another test may have let it, turns them off for the process in torch 2.4."""
    torch.set_flush_denormal(False)


def bits(tensor):
    return tensor.view(INTEGERS[tensor.element_size()])


def all_patterns(dtype):
    """Every number of a dtype of 16 bits: subnormal ones, both zeros, infinities and NaNs."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize(
    "values, dtype, expected",
    [
        ([1.0, -0.5, 65504.0, 2.0**-24], torch.float32, torch.float16),
        ([-0.0, 0.0], torch.float32, torch.float16),
        ([float("inf")], torch.float32, torch.float16),
        ([65536.0], torch.float32, torch.bfloat16),
        ([2.0**-25], torch.float32, torch.bfloat16),
        ([2.0**-133], torch.float32, torch.bfloat16),  # subnormal
        ([1.0, 1.0 + 2.0**-11], torch.float32, torch.float32),
        ([65536.0, 1.0 + 2.0**-10], torch.float32, torch.float32),  # one needs the range, the other the digits
        ([2.0**-149], torch.float32, torch.float32),
        ([0.1], torch.float64, torch.float64),
        ([1.0 + 2.0**-23], torch.float64, torch.float32),
        ([1.0], torch.float64, torch.float16),
        ([0.1], torch.float16, torch.float16),
        ([0.1], torch.bfloat16, torch.bfloat16),
        ([], torch.float32, torch.float16),
    ],
)
def test_dtype_is_the_smallest_that_gives_back_every_bit(values, dtype, expected):
    assert smallest_lossless_dtype(torch.tensor(values, dtype=dtype)) is expected


def test_one_odd_number_at_the_end_of_a_long_tensor_is_seen():
    tensor = torch.ones(600_001)
    tensor[-1] = 0.1
    assert smallest_lossless_dtype(tensor) is torch.float32


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_of_16_bits_comes_back(narrow, dtype):
    for number in all_patterns(narrow).to(dtype).split(64):
        anchor = make_anchor(number)
        assert torch.equal(bits(anchor.to(dtype)), bits(number))
    finite = all_patterns(narrow)
    finite = finite[finite.isfinite()].to(dtype)
    assert make_anchor(finite).dtype is narrow


def test_every_bit_pattern_of_float32_comes_back():
    patterns = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0))
    for pattern in patterns.to(torch.int32).view(torch.float32).split(4):
        assert torch.equal(bits(make_anchor(pattern).float()), bits(pattern))


def test_anchor_does_not_follow_its_parameter():
    parameter = torch.nn.Parameter(torch.ones(3))
    anchor = make_anchor(parameter)
    with torch.no_grad():
        parameter.add_(1)
    assert anchor.tolist() == [1, 1, 1] and not anchor.requires_grad


def test_anchor_keeps_the_memory_layout():
    parameter = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert make_anchor(parameter).stride() == parameter.stride()


def test_anchor_on_the_cpu_on_request():
    anchor = make_anchor(torch.randn(3), "cpu")
    assert anchor.device.type == "cpu" and anchor.is_pinned() == torch.cuda.is_available()


@pytest.mark.parametrize("parameter", [torch.zeros(2, dtype=torch.int8), torch.zeros(2, dtype=torch.complex64)])
def test_what_is_not_a_float_is_refused(parameter):
    with pytest.raises(ValueError, match="lipschitz_weight"):
        make_anchor(parameter)


def test_what_is_sharded_is_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.ones(4), mesh)
        with pytest.raises(ValueError, match="not sharded"):
            make_anchor(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_fingerprint_depends_on_values_only():
    weights = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    expected = fingerprint([weights])
    assert fingerprint([weights.float()]) == expected
    assert fingerprint([weights.to(memory_format=torch.channels_last)]) == expected
    assert fingerprint([torch.cat([torch.zeros(1, 5, 3, 3), weights])[1:]]) == expected


def test_fingerprint_sees_every_difference():
    first = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    second = torch.zeros(4)
    anchors = [first, second]
    variants = [[second, first], [first], [first, second, torch.zeros(0)], [first, second.view(2, 2)]]
    for position in (0, 1, 262_143, 262_144, 300_000):
        changed = first.clone()
        bits(changed)[position] ^= 1
        variants.append([changed, second])
    for left, right in ((0, 1), (0, 2), (1, 2), (5, 262_144 + 5), (299_999, 300_000)):
        swapped = first.clone()
        swapped[[left, right]] = first[[right, left]]
        variants.append([swapped, second])
    assert len({fingerprint(variant) for variant in [anchors, *variants]}) == len(variants) + 1


def test_fingerprint_means_the_same_in_every_release():
    anchors = [torch.arange(300_000) / 7, torch.ones(3, 3)]
    assert fingerprint(anchors) == "e8748302fe9a3dc974d3222fe4f8b816da05ebcc83497cac8d89d2b0f00f2f9c"
