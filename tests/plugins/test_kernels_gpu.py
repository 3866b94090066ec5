"""What only a GPU shows of the kernels: the tensor-core tiles, CUDA graphs, two streams at once, torch.ops.lrq.

The numbers of every kernel are held against the references by tests/plugins/kernels, whose `cuda` cases run in this
tier too, those of random sizes among them.
"""

import kernel_machine
import numpy as np
import pytest

from graphs.ops import words
from graphs.ops.token_product import quantize_tokens, token_product
from graphs.ops.twin_log_dequant import integer_weight, random_exponents
from lrq_export.kernels import Format, KernelError, Layout, Status, Tactic

pytestmark = pytest.mark.gpu
NMSE = {"float32": 1e-14, "float16": 1e-9, "bfloat16": 1e-9}
TILES = [tactic for tactic in Tactic if tactic.name.startswith("TILE")]

# (tokens, rows, cols): one tile and a part, single tokens, odd numbers of tokens, many tiles, parts of a stage.
SHAPES = [(128, 256, 128), (1, 128, 64), (77, 192, 1152), (1025, 1152, 1152), (512, 3072, 3072), (300, 8, 16)]
# Beside them random ones that tiles take: whole vectors of rows, columns by 16.
SHAPES += [(int(m), 8 * int(n), 16 * int(k)) for m, n, k in np.random.default_rng(0).integers(1, [400, 80, 80], (6, 3))]


@pytest.fixture(scope="module")
def torch():
    kernel_machine.cuda_machine()  # skips where there is none
    import torch

    import lrq_export.torch_ops  # noqa: F401

    return torch


class Layer:
    """A random twin-log layer on the GPU and in numpy."""

    def __init__(self, torch, rows, cols, bits=4, seed=0):
        from lrq_export.torch_ops import WeightForm

        rng = np.random.default_rng(seed)
        codes, self.exponents = rng.integers(0, 1 << bits, (rows, cols)), random_exponents(rng, rows, 1, bits)
        self.words = words.prepack(codes, bits)
        self.integers = integer_weight(
            self.words, self.exponents, bits=bits, group_size=cols, cols=cols, layout="words"
        )
        self.scale, self.bias = rng.uniform(0.001, 0.01, rows).astype(np.float32), rng.standard_normal(rows, np.float32)
        self.form = WeightForm(rows, cols, cols, Format.TWIN_LOG, Layout.WORDS, bits).values()
        arrays = (self.words, self.exponents, self.scale, self.bias)
        self.tensors = tuple(torch.from_numpy(array).cuda() for array in arrays)
        self.torch = torch

    def run(self, x, **options):
        return self.torch.ops.lrq.linear(x, *self.tensors, self.form, 8, **options)

    def reference(self, x, gate=None, residual=None):
        y = token_product(x.float().cpu().numpy(), self.integers, self.scale, self.bias, act_bits=8)
        return y if gate is None else residual.float().cpu().numpy() + gate.float().cpu().numpy() * y


def check(got, needed, dtype, sizes=""):
    assert kernel_machine.nmse(got.float().cpu().numpy(), rounded(needed, dtype)) <= NMSE[dtype], sizes


def rounded(array, dtype):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype)).float().numpy()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", NMSE)
@pytest.mark.parametrize("tactic", TILES, ids=lambda tactic: tactic.name)
def test_every_tile_multiplies_as_the_reference(torch, tactic, dtype, gated):
    ran = 0
    for tokens, rows, cols in SHAPES:
        layer, draw = Layer(torch, rows, cols), drawing(torch, tokens, dtype)
        x = draw(tokens, cols)
        options = {"gate": draw(tokens, rows), "residual": draw(tokens, rows)} if gated else {}
        if (got := run_if_compiled(layer, x, tactic, options)) is not None:
            check(got, layer.reference(x, *options.values()), dtype, (tokens, rows, cols))
            ran += 1
    if not ran:
        pytest.skip(f"{tactic.name} of {dtype} is not in the list of this architecture")


def drawing(torch, seed, dtype):
    generator = torch.Generator("cuda").manual_seed(seed)
    return lambda *shape: torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, dtype))


def run_if_compiled(layer, x, tactic, options):
    try:
        return layer.run(x, tactic=int(tactic), **options)
    except KernelError as error:
        if error.status != Status.NOT_COMPILED:
            raise
        return None


def test_one_perturbed_code_changes_one_channel_of_a_tile(torch):
    layer = Layer(torch, 256, 256)
    x = torch.randn(200, 256, device="cuda", dtype=torch.float16)
    before = layer.run(x)
    layer.tensors[0].view(torch.uint8)[17, 5] ^= 1
    changed = (layer.run(x) != before).any(0).nonzero().flatten().tolist()
    assert changed == [17]


@pytest.mark.parametrize("outer", [1, 2, 3])
def test_a_gate_of_one_row_a_sample_is_broadcast(torch, outer):
    layer, inner = Layer(torch, 256, 256), 100
    x = torch.randn(outer, inner, 256, device="cuda")
    gate, residual = torch.randn(outer, 1, 256, device="cuda"), torch.randn(outer, inner, 256, device="cuda")
    check(layer.run(x, gate=gate, residual=residual), layer.reference(x, gate, residual), "float32")


def test_large_weights_are_multiplied_in_parts_that_fit_in_l2(torch):
    layer = Layer(torch, 12288, 3072)
    x = torch.randn(130, 3072, device="cuda", dtype=torch.bfloat16)
    decoded = torch.ops.lrq.decode(*layer.tensors[:2], layer.form)
    assert torch.equal(decoded.cpu(), torch.from_numpy(layer.integers))
    assert torch.equal(layer.run(x), layer.run(x, decoded=decoded))


@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
def test_calls_replay_in_a_cuda_graph(torch, tokens):
    layer, block = Layer(torch, 512, 1024), 256
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
    signs = torch.ones(1024, device="cuda", dtype=torch.float16)
    eager = layer.run(x, signs=signs, block=block)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.run(x, signs=signs, block=block)
    other = torch.randn_like(x)
    for value in (x.clone(), other):
        x.copy_(value)
        graph.replay()
        assert torch.equal(captured, layer.run(value, signs=signs, block=block))
    assert not torch.equal(captured, eager)


ALONE = {
    "runs": (1024, 1), "columns of several tokens": (1024, 128), "columns": (3072, 3072), "a whole row": (16384, 16384),
    "columns that are split": (13824, 13824), "shared memory": (1152, 24),
}  # fmt: skip


@pytest.mark.parametrize(("cols", "block"), ALONE.values(), ids=ALONE)
def test_a_rotation_alone_replays_in_a_cuda_graph(torch, cols, block):
    x, signs = torch.randn(33, cols, device="cuda", dtype=torch.bfloat16), torch.ones(cols, device="cuda").bfloat16()
    replayed_as_called(torch, x, lambda: torch.ops.lrq.rotate_quantize(x, signs, block, 8))


@pytest.mark.parametrize("bits", [3, 4])
def test_a_decode_alone_replays_in_a_cuda_graph(torch, bits):
    layer = Layer(torch, 512, 1024, bits)
    replayed_as_called(torch, layer.tensors[0], lambda: (torch.ops.lrq.decode(*layer.tensors[:2], layer.form),))


def replayed_as_called(torch, source, call):
    """A graph of the call computes what the call does, of what lies in `source` when it is replayed."""
    call()  # what is loaded with the first launch is not to be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    before = [each.clone() for each in call()]
    source.copy_(source.roll(1, 0))
    graph.replay()
    torch.cuda.synchronize()
    for got, needed, old in zip(captured, call(), before, strict=True):
        assert torch.equal(got, needed)
        assert not torch.equal(got, old)


def test_two_streams_do_not_disturb_each_other(torch):
    layers = [Layer(torch, 1024, 1024, seed=seed) for seed in range(2)]
    x = [torch.randn(700, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    needed = [layer.run(each) for layer, each in zip(layers, x, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[index].append(layers[index].run(x[index]))
    torch.cuda.synchronize()
    for index in range(2):
        assert all(torch.equal(each, needed[index]) for each in got[index])


def test_codes_on_the_gpu_are_the_codes_of_numpy(torch):
    x = torch.randn(50, 4096, device="cuda")
    codes, scales = torch.ops.lrq.rotate_quantize(x, None, 1, 8)
    needed, needed_scales = quantize_tokens(x.cpu().numpy(), 8)
    np.testing.assert_array_equal(codes.cpu().numpy(), needed)
    np.testing.assert_array_equal(scales.cpu().numpy(), needed_scales)


def test_a_compiled_model_calls_the_kernels(torch):
    layer = Layer(torch, 256, 256)
    x = torch.randn(40, 256, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: layer.run(torch.nn.functional.silu(x)), fullgraph=True)
    needed = layer.run(torch.nn.functional.silu(x)).float()
    assert ((compiled(x).float() - needed) ** 2).sum() < 1e-3 * (needed**2).sum()
