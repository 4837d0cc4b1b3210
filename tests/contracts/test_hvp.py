"Hessian-vector products: every scheme on every kind of input, and nothing moved, written or left behind."
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from lal.core.device import generator, seeded
from lal.modular.models import BaselineMLP, GrokTransformer
from lal.modular.task import Task, encode, examples
from lal.curvature.hessian_operator import FiniteDifferenceOperator, HessianOperator
from lal.curvature.hvp import SCHEMES, STEPS, NotTwiceDifferentiable, _check_graph, gradient, hvp, twice_differentiable
from lal.curvature.params import axpy, cosine, dot, flatten, loss_function, norm, params_of, unflatten
from lal.curvature.precision import Following, Widened

F64 = torch.float64
X = torch.randn(6, 2, generator=generator(0, "x"))
GOOD = {"w": torch.randn(2, 3, generator=generator(0, "w")), "b": torch.randn(3, generator=generator(0, "b"))}
V = {"w": torch.randn(2, 3, generator=generator(1, "w")), "b": torch.randn(3, generator=generator(1, "b"))}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def smooth(p):
    return (X.to(p["w"].dtype) @ p["w"] + p["b"]).tanh().square().mean()


def as_dtype(params, dtype):
    return {name: t.to(dtype) for name, t in params.items()}


def close(a, b, tolerance=1e-5):
    a, b = as_dtype(a, F64), as_dtype(b, F64)
    return float(norm(axpy(-1, b, a))) <= tolerance * float(norm(b))


REFERENCE = hvp(smooth, as_dtype(GOOD, F64), as_dtype(V, F64), "exact")
LIVE = as_dtype(GOOD, F64)

BAD = [  # what is asked, and words the error must say
    ((smooth, GOOD, {**V, "c": V["b"]}), "only v has c"),
    ((smooth, GOOD, {"w": V["w"]}), "only params has b"),
    ((smooth, GOOD, {"w": V["w"].T, "b": V["b"]}), "w is [2, 3] in params and [3, 2] in v"),
    ((smooth, GOOD, {"w": V["w"], "b": V["b"][None]}), "b is [3] in params and [1, 3] in v"),
    ((smooth, GOOD, as_dtype(V, F64)), "v is torch.float64"),
    ((smooth, GOOD, {**V, "b": V["b"].double()}), "v mixes"),
    ((smooth, {**GOOD, "b": GOOD["b"].double()}, V), "params mixes"),
    ((smooth, GOOD, {k: t.to("meta") for k, t in V.items()}), "meta"),
    ((smooth, as_dtype(GOOD, torch.long), as_dtype(V, torch.long)), "torch.int64"),
    ((smooth, as_dtype(GOOD, torch.cfloat), as_dtype(V, torch.cfloat)), "torch.complex64"),
    ((smooth, {}, {}), "no parameters"),
    ((smooth, list(GOOD.values()), V), "params is a list"),
    ((smooth, GOOD, flatten(V)), "v is a Tensor"),
    ((smooth, GOOD, {"w": V["w"], "b": 1.0}), "v['b'] is a float"),
    ((lambda t: t.sum(), X, GOOD), "not a tensor"),
    ((smooth, GOOD, {**V, "b": V["b"] / 0}), "v is not finite in b"),
    ((smooth, {**GOOD, "b": GOOD["b"] * torch.nan}, V), "the gradient of f is not finite in"),
    ((lambda p: smooth(p) + p["b"].abs().sqrt().sum(), {**GOOD, "b": torch.zeros(3)}, V), "not finite in b"),
    ((lambda p: p["w"].sum(1), GOOD, V), "shape [2]"),
    ((lambda p: smooth(p)[None], GOOD, V), "shape [1]"),
    ((lambda p: smooth(p).item(), GOOD, V), "returned a float"),
    ((lambda p: None, GOOD, V), "returned a NoneType"),
    ((lambda p: smooth(LIVE), GOOD, V), "does not depend on params"),
    ((lambda p: smooth(as_dtype(p, F64)).detach(), GOOD, V), "does not depend on params"),
    ((smooth, GOOD, V, "centre"), "forward, central, exact"),
    ((smooth, GOOD, V, "forward", 0), "epsilon = 0"),
    ((smooth, GOOD, V, "central", -1.0), "epsilon = -1.0"),
    ((smooth, GOOD, V, "forward", float("inf")), "epsilon = inf"),
    ((smooth, GOOD, V, "forward", float("nan")), "epsilon = nan"),
    ((smooth, GOOD, V, "forward", "small"), "epsilon = 'small'"),
    ((smooth, GOOD, V, "forward", True), "epsilon = True"),
    ((smooth, GOOD, V, "forward", 1e-20), "changes no parameter"),
    ((smooth, GOOD, V, "exact", 1e-3), "leave epsilon out"),
    ((smooth, GOOD, V, "central", None, GOOD), "forward scheme only"),
    ((smooth, GOOD, V, "forward", None, gradient(smooth, GOOD)), "pass gradient(f, params, torch.float64)"),
    ((smooth, GOOD, V, "forward", 1e-3, gradient(smooth, GOOD, F64)), "evaluated in torch.float32"),
    ((smooth, GOOD, V, "forward", 1e-3, {"w": GOOD["w"]}), "only params has b"),
    ((smooth, GOOD, V, "forward", 1e-3, {**GOOD, "b": GOOD["b"] / 0}), "base is not finite in b"),
    ((lambda p: (X @ p["w"]).square().sum(), GOOD, V), "follow the dtype of its params"),
    ((lambda p: smooth(as_dtype(p, torch.float32)), GOOD, V), "f returned torch.float32"),
    ((lambda p: smooth(p) + torch.rand(()), GOOD, V), "model.eval()"),
    ((lambda p: smooth(p) + torch.rand(()), GOOD, V, "central"), "model.eval()"),
    ((lambda p: smooth(p) + torch.rand(()), GOOD, V, "exact"), "model.eval()"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_clear_error(arguments, words):
    state = torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        hvp(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_f_is_its_own():
    def broken(p):
        torch.rand(())
        raise KeyError("f has a mistake")

    for scheme in SCHEMES:
        state = torch.get_rng_state()
        with pytest.raises(KeyError, match="f has a mistake"):
            hvp(broken, GOOD, V, scheme)
        assert torch.equal(torch.get_rng_state(), state)


@each_scheme
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_result_follows_the_dtype(scheme, dtype, tolerance):
    product = hvp(smooth, as_dtype(GOOD, dtype), as_dtype(V, dtype), scheme)
    assert {t.dtype for t in product.values()} == {dtype} and close(product, REFERENCE, tolerance)


@each_scheme
def test_live_parameters_are_left_alone(scheme):
    live = {name: nn.Parameter(t.clone()) for name, t in GOOD.items()}
    before = {name: (t.detach().clone(), t._version) for name, t in live.items()}
    for around in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with around():
            product = hvp(smooth, live, V, scheme)
        assert close(product, REFERENCE) and not any(t.requires_grad for t in product.values())
    for name, t in live.items():
        assert t.grad is None and t.requires_grad and torch.equal(t.detach(), before[name][0]) and t._version == before[name][1]


@each_scheme
def test_memory_layout_and_order_of_names_do_not_matter(scheme):
    turned = {"b": GOOD["b"].repeat_interleave(2)[::2], "w": GOOD["w"].T.contiguous().T}
    assert not turned["w"].is_contiguous() and not turned["b"].is_contiguous()
    product = hvp(smooth, turned, {name: V[name] for name in ("w", "b")}, scheme)
    assert list(product) == ["b", "w"] and close(product, REFERENCE)


@each_scheme
@pytest.mark.parametrize("length", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_the_product_is_linear_in_the_length_of_v(scheme, length):
    product = hvp(smooth, GOOD, {name: length * t for name, t in V.items()}, scheme)
    assert close(product, {name: length * t for name, t in REFERENCE.items()})


@each_scheme
def test_zero_unused_linear_and_empty(scheme):
    nothing = hvp(smooth, GOOD, {name: 0 * t for name, t in V.items()}, scheme)
    assert not any(t.any() for t in nothing.values())
    spare = {**GOOD, "spare": torch.ones(4), "empty": torch.zeros(0, 3)}
    product = hvp(smooth, spare, {**V, "spare": torch.ones(4), "empty": torch.zeros(0, 3)}, scheme)
    assert not product["spare"].any() and product["empty"].shape == (0, 3) and close({k: product[k] for k in V}, REFERENCE)
    linear = hvp(lambda p: p["w"].sum() + 2 * p["b"].sum(), GOOD, V, scheme)
    assert not any(t.any() for t in linear.values())


@each_scheme
def test_one_tensor_is_a_dict_of_one(scheme):
    flat = lambda t: smooth(unflatten(t, GOOD))
    product = hvp(flat, flatten(GOOD), flatten(V), scheme)
    assert isinstance(product, torch.Tensor) and close(unflatten(product, GOOD), REFERENCE)
    scalar = hvp(lambda t: t**3, torch.tensor(2.0), torch.tensor(1.0), scheme)
    assert scalar.shape == () and abs(scalar - 12) < 1e-5


@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_a_base_gradient_gives_the_same_bits(epsilon):
    base = gradient(smooth, GOOD, F64 if epsilon is None else None)
    one, two = hvp(smooth, GOOD, V, epsilon=epsilon, base=base), hvp(smooth, GOOD, V, epsilon=epsilon)
    assert all(torch.equal(one[name], two[name]) for name in V)


@pytest.mark.parametrize("scheme, calls", [("forward", 2), ("central", 2), ("exact", 1)])
def test_the_number_of_evaluations(scheme, calls):
    seen = []
    hvp(lambda p: seen.append({t.dtype for t in p.values()}) or smooth(p), GOOD, V, scheme)
    assert seen == [{torch.float32 if scheme == "exact" else F64}] * calls


def test_a_number_for_epsilon_stays_in_the_dtype():
    seen = []
    product = hvp(lambda p: seen.append(p["w"].dtype) or smooth(p), GOOD, V, "central", 1e-2)
    assert seen == [torch.float32] * 2 and close(product, REFERENCE, 1e-2)


def test_measuring_moves_no_generator_and_no_training():
    with seeded(0, "init"):
        model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    task = Task(5)
    x, y = encode(examples(task), "onehot"), examples(task).y
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state, f, params = torch.get_rng_state(), loss_function(model, x, y), params_of(model)
    for scheme in SCHEMES:
        model.train()
        with pytest.raises(ValueError, match="dropout"):
            hvp(f, params, params, scheme)
        model.eval()
        assert norm(hvp(f, params, params, scheme)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["mlp", "transformer", "tied"])
def test_models_agree_with_the_dense_hessian(kind):
    task = Task(5)
    with seeded(3, "init"):
        model = BaselineMLP(task, 8) if kind == "mlp" else GrokTransformer(task, 4, 1, 2, tie_embeddings=kind == "tied")
    f, params = loss_function(model, encode(examples(task), model.encoding), examples(task).y), params_of(model, F64)
    flat = lambda t: f(unflatten(t, params))
    theta = flatten(params).requires_grad_()
    slope = torch.autograd.grad(flat(theta), theta, create_graph=True)[0]
    H = torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in slope])
    assert (H - H.T).norm() < 1e-12 * H.norm()
    v = torch.randn(len(H), dtype=F64, generator=generator(0, kind))
    for scheme, tolerance in (("exact", 1e-10), ("forward", 1e-4), ("central", 1e-7)):
        product = flatten(hvp(f, params, unflatten(v, params), scheme))
        assert (product - H @ v).norm() <= tolerance * (H @ v).norm(), scheme


def test_the_automatic_steps():
    assert STEPS == {"forward": 2.0**-26.5, "central": pytest.approx(4.81e-6, rel=1e-3)}


def test_the_algebra_follows_dtype_and_device():
    for dtype in (F64, torch.float32, torch.bfloat16):
        a, b = as_dtype(GOOD, dtype), as_dtype(V, dtype)
        assert dot(a, b).dtype == norm(a).dtype == cosine(a, b).dtype == flatten(a).dtype == dtype
    there = {k: t.to("meta") for k, t in GOOD.items()}
    assert dot(there, there).device.type == norm(there).device.type == cosine(there, there).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_scheme
def test_on_cuda(scheme):
    there, v = ({k: t.cuda() for k, t in x.items()} for x in (GOOD, V))
    f = lambda p: (X.to(p["w"]) @ p["w"] + p["b"]).tanh().square().mean()
    product = hvp(f, there, v, scheme)
    assert product["w"].is_cuda and close({k: t.cpu() for k, t in product.items()}, REFERENCE)
    state = torch.cuda.get_rng_state()
    with pytest.raises(ValueError, match="model.eval()"):
        hvp(lambda p: f(p) + torch.rand((), device="cuda"), there, v, scheme)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@each_scheme
def test_f_may_change_the_dict_it_is_given(scheme):
    def f(p):
        p["w"] = p["w"] * 2
        return (p.pop("w") ** 4).sum()

    w = torch.randn(5, generator=generator(2, "w"))
    v = {"w": torch.ones(5)}
    assert close(hvp(f, {"w": w}, v, scheme), {"w": 192 * w**2}, 1e-4)


# Digits that are dropped inside f.

DATA = torch.randn(64, 10, generator=generator(0, "data")), torch.randint(5, (64,), generator=generator(1, "data"))


class Between(nn.Module):
    "A layer from a function."
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x): return self.act(x)


def network(act):
    with seeded(0, "init"): model = nn.Sequential(nn.Linear(10, 20), Between(act), nn.GELU(), nn.Linear(20, 5))
    return loss_function(model, *DATA), params_of(model)


def rms_norm(x, dtype=torch.float32):
    y = x.to(dtype)
    return (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


class NormInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return rms_norm(x)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(rms_norm(x, x.dtype), x, g)[0]


class BackNarrow(NormInside):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return rms_norm(x, x.dtype)

    @staticmethod
    def backward(ctx, g):
        return NormInside.backward(ctx, g.float()).to(g.dtype)


class Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g): return g * ctx.saved_tensors[0].cos()


def rotary(x):
    with torch.no_grad(): angle = torch.arange(20, device=x.device).to(x.dtype).float().mul(0.1).cos()
    return x * angle.to(x.dtype)


def in_autocast(x):
    with torch.autocast("cpu", torch.bfloat16): return (x @ torch.eye(20, dtype=x.dtype)).to(x.dtype)


NARROW = {
    "RMSNorm": (rms_norm, "float32"),
    "softmax": (lambda x: functional.softmax(x, -1, dtype=torch.float32).to(x.dtype), "float32"),
    "bfloat16": (lambda x: rms_norm(x, torch.bfloat16), "bfloat16"),
    "float16": (lambda x: rms_norm(x, torch.float16), "float16"),
    "Fourier": (lambda x: torch.fft.rfft(x.float(), n=38).abs().to(x.dtype), "complex64"),
    "complex": (lambda x: torch.fft.rfft(x, n=38).to(torch.complex64).to(torch.complex128).abs().to(x.dtype), "complex64"),
    "own function": (NormInside.apply, "float32"),
    "own backward": (BackNarrow.apply, "float32"),
    "checkpoint": (lambda x: checkpoint(rms_norm, x, use_reentrant=False), "float32"),
    "compiled": (torch.compile(rms_norm, backend="aot_eager"), "float32"),
}
WIDE = {"plain": torch.tanh, "rotary": rotary, "own function": Whole.apply, "autocast": in_autocast, "rotary beside an own function": lambda x: rotary(Whole.apply(x)),
        "detached": lambda x: x - (x.detach().float() * 0).to(x.dtype)}


@pytest.mark.parametrize("kind", NARROW)
def test_a_function_that_drops_digits_inside_is_refused_by_the_automatic_step(kind):
    act, dtype = NARROW[kind]
    f, params = network(act)
    v = gradient(f, params)
    for ask in (lambda: hvp(f, params, v), lambda: hvp(f, params, v, "central"), lambda: gradient(f, params, F64), lambda: FiniteDifferenceOperator(f, params),
                lambda: hvp(f, as_dtype(params, F64), as_dtype(v, F64))):
        with pytest.raises(ValueError) as error: ask()
        text = str(error.value)
        assert dtype in text and "somewhere: make f follow the dtype of its params, give hvp a number for epsilon, or use scheme = exact" in text and "\n" not in text
    assert float(norm(hvp(f, params, v, "central", 1e-1))) > 0


@pytest.mark.parametrize("kind", WIDE)
def test_digits_that_no_gradient_passes_through_do_not_matter(kind):
    f, params = network(WIDE[kind])
    v = gradient(f, params)
    exact = hvp(f, as_dtype(params, F64), as_dtype(v, F64), "exact")
    for scheme, promise in (("forward", 1e-3), ("central", 1e-5)):
        assert close(hvp(f, params, v, scheme), exact, promise)
        assert close(FiniteDifferenceOperator(f, params, scheme) @ v, exact, promise)


def test_parameters_of_others_may_be_narrow():
    live = nn.Parameter(torch.randn(3, generator=generator(0, "live")))
    f = lambda p: smooth({"w": p["w"], "b": live.to(p["w"].dtype)})
    assert close(hvp(f, {"w": GOOD["w"]}, {"w": V["w"]}), hvp(f, {"w": GOOD["w"]}, {"w": V["w"]}, "exact"))


@pytest.mark.parametrize("scheme", STEPS)
def test_a_gradient_of_nothing_but_rounding_is_no_float32_inside(scheme):
    def linear(p): return 3 * p["w"].sum()
    assert float(norm(hvp(linear, GOOD, V, scheme))) == 0
    with seeded(0, "init"): model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 3))
    f, params = loss_function(model, X, torch.tensor([0, 1, 2, 0, 1, 2])), params_of(model)     # the first bias has no influence
    v = gradient(f, params)
    assert close(hvp(f, params, v, scheme), hvp(f, params, v, "exact"), 1e-3)


# The step that is made.


def unequal(big):
    return (lambda p: (p["a"] / big) ** 3 * p["b"] ** 3), {"a": torch.tensor(big, dtype=F64), "b": torch.ones((), dtype=F64)}


@pytest.mark.parametrize("big", [1e2, 1e4, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("scheme, epsilon, promise", [("forward", None, 1e-3), ("central", None, 1e-4), ("forward", 1e-4, 0.3), ("central", 1e-4, 0.3)])
def test_parameters_of_unequal_size_give_the_product_or_an_error_that_names_them(big, dtype, scheme, epsilon, promise):
    f, params = unequal(big)
    params, refused = as_dtype(params, dtype), 0
    for direction in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}):
        v = {k: torch.tensor(x, dtype=dtype) for k, x in direction.items()}
        exact = hvp(f, as_dtype(params, F64), as_dtype(v, F64), "exact")
        try:
            product = hvp(f, params, v, scheme, epsilon)
        except ValueError as error:
            text, refused = str(error), refused + 1
            assert direction["a"] and ("changes no parameter" in text or "for the size of a: rounding" in text and "larger epsilon, or rescale" in text) and "\n" not in text
            with pytest.raises(ValueError, match="a: rounding|changes no parameter"): FiniteDifferenceOperator(f, params, scheme, epsilon) @ v
        else:
            assert close(product, exact, promise)
    assert refused if big == 1e12 else not refused or big > 1e2 or dtype == torch.float32


def test_the_quotient_is_divided_by_the_step_that_was_made():
    t, f = torch.tensor(512.0), lambda t: t**2 / 2
    for epsilon in (1e-3, 1.04e-3):  # 16.4 and 17.04 units in the last place
        products = hvp(f, t, torch.ones(()), "forward", epsilon), FiniteDifferenceOperator(f, t, "forward", epsilon) @ torch.ones(1)
        assert all(abs(float(x) - 1) < 1e-6 for x in products)


def test_a_product_that_overflows_is_an_error():
    f = lambda t: (t**2).sum() * 1e30
    for scheme, epsilon in (("forward", None), ("central", None), ("forward", 1e-3), ("central", 1e-3), ("exact", None)):
        with pytest.raises(ValueError, match="the Hessian-vector product is not finite in"): hvp(f, torch.ones(3), 1e30 * torch.ones(3), scheme, epsilon)


# Operations without a second derivative.


def attention(t, p=0.0, fused=True, causal=True):
    q, k, v = t.view(3, 1, 2, 5, 4)
    with seeded(0, "dropout"):
        if fused: return functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal).pow(3).sum()
        scores = (q / 4**0.25) @ (k / 4**0.25).transpose(2, 3)
        weights = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1) & causal, -torch.inf).softmax(-1)
        return (functional.dropout(weights, p) @ v).pow(3).sum()


T, W = torch.randn(2, 120, dtype=F64, generator=generator(0, "attention"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_product_through_fused_attention_is_that_of_the_dense_hessian(p, causal):
    f = lambda t: attention(t, p, causal=causal)
    written = lambda t: attention(t, p, False, causal)
    assert torch.allclose(f(T), written(T), rtol=1e-12)
    theta = T.clone().requires_grad_()
    slope = torch.autograd.grad(written(theta), theta, create_graph=True)[0]
    H = torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in slope])
    assert (H - H.T).norm() < 1e-12 * H.norm()
    for scheme, tolerance in (("exact", 1e-10), ("central", 1e-7), ("forward", 1e-5)):
        assert (hvp(f, T, W, scheme) - H @ W).norm() < tolerance * (H @ W).norm(), scheme
        assert (hvp(f, T.float(), W.float(), scheme) - H @ W).norm() < 1e-4 * (H @ W).norm(), scheme


def test_the_kernel_is_changed_for_the_exact_product_alone():
    seen = []
    def f(t):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return attention(t)
    hvp(f, T, W, "exact")
    hvp(f, T, W)
    assert seen == [True, False, True, True] and torch.backends.cuda.flash_sdp_enabled()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return t**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def compiled(p):
    return torch.compile(lambda t: (t**3).sum(), backend="aot_eager")(p["w"])


ONCE = [  # functions, and words that the error must say
    (lambda p: Cube.apply(p["w"]).sum(), "Cube is once_differentiable"),
    (lambda p: Cube.apply(p["w"] ** 2).square().sum() + p["b"].sum(), "Cube is once_differentiable"),
    (lambda p: torch.cdist(p["w"].T, X).sum(), "'_cdist_backward' is not implemented"),
    (compiled, "torch.compile with aot_autograd"),
]


@pytest.mark.parametrize("f, words", ONCE, ids=[words for _, words in ONCE])
def test_an_operation_without_a_second_derivative_is_named_with_the_way_out(f, words):
    params = {**GOOD, "w": GOOD["w"] + 3}
    with pytest.raises(NotTwiceDifferentiable) as error:
        hvp(f, params, V, "exact")
    assert words in str(error.value) and "use scheme = forward or central" in str(error.value) and "\n" not in str(error.value)
    assert close(hvp(f, params, V, epsilon=1e-2), hvp(f, params, V, "central", 1e-2), 0.1)


ops = torch.ops.aten
FUSED = {
    "flash": lambda q, p: ops._scaled_dot_product_flash_attention(q, q, q, p)[0],
    "efficient": lambda q, p: ops._scaled_dot_product_efficient_attention(q, q, q, None, True, p)[0],
    "cudnn": lambda q, p: ops._scaled_dot_product_cudnn_attention(q, q, q, None, True, p)[0],
}


@pytest.mark.parametrize("kind", FUSED)
def test_the_dropout_of_fused_attention_on_a_gpu_is_seen_in_the_graph(kind):
    q = torch.randn(1, 2, 8, 8, device="meta", requires_grad=True)
    assert _check_graph(FUSED[kind](q, 0.0).sum()) and not _check_graph(q.sum())
    with pytest.raises(NotTwiceDifferentiable, match="scaled_dot_product_attention with dropout"):
        _check_graph(FUSED[kind](q, 0.1).sum())

    def f(p):  # as PyTorch chooses the kernel on a GPU
        q = p["q"]
        return (functional.dropout(q, 0.1) if q.dtype == F64 else FUSED[kind](q, 0.1)).sum()

    point = {"q": q.detach()}
    with pytest.raises(ValueError, match="draws another mask in torch.float64: .* give hvp a number for epsilon"):
        Following(f, point, F64)(as_dtype(point, F64))


# The same random numbers in every dtype.

DRAWS = {
    "rand": lambda t: torch.rand(t.shape, dtype=t.dtype),
    "randn": lambda t: torch.randn(t.shape, dtype=t.dtype),
    "normal": lambda t: torch.normal(0.0, 1.0, t.shape, dtype=t.dtype),
    "float32 alone": lambda t: torch.rand(t.shape, dtype=torch.float32).to(t),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randn_like, turned": lambda t: torch.randn_like(t.T).T,
    "randint_like": lambda t: torch.randint_like(t, 9),
    "integers": lambda t: torch.randint_like(t, 9, dtype=torch.long).to(t),
    "uniform_": lambda t: torch.empty_like(t).uniform_(-1, 1),
    "every second": lambda t: torch.zeros_like(t).repeat(2, 2)[::2, ::2].uniform_(),
    "normal_": lambda t: torch.empty_like(t).normal_(),
    "exponential_": lambda t: torch.empty_like(t).exponential_(),
    "cauchy_": lambda t: torch.empty_like(t).cauchy_(),
    "log_normal_": lambda t: torch.empty_like(t).log_normal_(),
    "geometric_": lambda t: torch.empty_like(t).geometric_(0.3),
    "bernoulli_": lambda t: torch.empty_like(t).bernoulli_(0.3),
    "bernoulli": lambda t: torch.bernoulli(torch.full_like(t, 0.3)),
    "multinomial": lambda t: torch.multinomial(torch.full_like(t, 0.5), 3).to(t),
    "randperm": lambda t: t[torch.randperm(len(t))],
    "own generator": lambda t: torch.rand(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(1)),
    "dropout": lambda t: functional.dropout(t, 0.3),
    "native_dropout": lambda t: torch.native_dropout(t, 0.5, True)[0],
    "not training": lambda t: torch.native_dropout(t, 0.5, False)[0],
    "feature dropout": lambda t: functional.dropout1d(t, 0.3),
    "distribution": lambda t: torch.distributions.Uniform(0 * t, t).rsample(),
}


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DRAWS)
def test_random_numbers_in_float64_are_those_of_the_own_dtype(kind, own):
    draw, t = DRAWS[kind], torch.ones(40, 30)
    with seeded(0, "probe"): want, state = draw(t.to(own)), torch.get_rng_state()
    with seeded(0, "probe"), Widened(own, F64): found, after = draw(t.double()), torch.get_rng_state()
    assert found.dtype == F64 and torch.equal(state, after)
    assert torch.allclose(found, want.double(), rtol=torch.finfo(own).eps, atol=0)  # dropout divides by 1 − p


def replayed(draw):
    def f(p):
        with seeded(0, "probe"): return draw(p)
    return f


NOISY = {
    "noise": lambda p: smooth(p) + (torch.randn_like(p["w"]) * p["w"]).tanh().square().sum(),
    "mask": lambda p: (smooth(p) + functional.dropout(p["w"].sin(), 0.5).square().sum()),
    "checkpoint": lambda p: checkpoint(lambda w: (w.sin() * torch.rand_like(w)).square().sum(), p["w"], use_reentrant=False) + smooth(p),
    "attention": lambda p: functional.scaled_dot_product_attention(p["w"][None], p["w"][None], p["w"][None], dropout_p=0.4).square().sum() + smooth(p),
}


@pytest.mark.parametrize("kind", NOISY)
def test_a_function_that_draws_is_the_same_in_every_dtype(kind):
    f = replayed(NOISY[kind])
    assert close(gradient(f, GOOD), gradient(f, GOOD, F64))
    state, exact = torch.get_rng_state(), hvp(f, GOOD, V, "exact")
    for scheme in STEPS:
        assert close(hvp(f, GOOD, V, scheme), exact)
    assert torch.equal(torch.get_rng_state(), state)


SPLIT = {
    "rrelu": lambda p: functional.rrelu(p["w"] - 5, training=True).square().sum(),
    "normal": lambda p: torch.normal(p["w"], 1.0).sum() + smooth(p),
    "_standard_gamma": lambda p: torch._standard_gamma(p["w"].exp()).sum(),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_random_numbers_that_cannot_be_told_from_the_inputs_are_an_error(kind):
    f = replayed(SPLIT[kind])
    with pytest.raises(ValueError) as error:
        gradient(f, GOOD, F64)
    assert f"aten::{kind}" in str(error.value) and "give hvp a number for epsilon" in str(error.value) and "\n" not in str(error.value)
    assert gradient(f, GOOD).keys() == GOOD.keys()


# Second derivatives that are missing or wrong.


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_gradient_is_one_clear_error(layer):
    with seeded(0, "init"): model = nn.Sequential(layer(13, 4, sparse=True), nn.Linear(4, 5))
    x = torch.arange(10)[:, None] if layer is nn.EmbeddingBag else torch.arange(10)
    f, params = loss_function(model, x, DATA[1][:10]), params_of(model)
    v = {k: torch.ones_like(t) for k, t in params.items()}
    asked = [lambda: gradient(f, params), lambda: HessianOperator(f, params), lambda: FiniteDifferenceOperator(f, params), lambda: twice_differentiable(f, as_leaves(params))]
    for act in asked + [lambda s=s: hvp(f, params, v, s) for s in SCHEMES]:
        with pytest.raises(ValueError, match="sparse.*: build the embedding with sparse=False$"): act()


def as_leaves(params):
    return {k: t.clone().requires_grad_() for k, t in params.items()}


@pytest.mark.parametrize("dim", [0, 1])
def test_the_wrong_second_derivative_of_weight_norm_is_refused(dim):
    def normed(p):
        x = DATA[0].to(p["g"].dtype)
        return (x @ torch._weight_norm(p["v"], p["g"], dim).T).tanh().square().mean()

    def by_hand(p):
        return (DATA[0].to(p["g"].dtype) @ (p["g"] * p["v"] / p["v"].norm(dim=1 - dim, keepdim=True)).T).tanh().square().mean()

    rng = generator(0, "w")
    params = {"v": torch.randn(3, 10, dtype=F64, generator=rng), "g": torch.ones((3, 1) if dim == 0 else (1, 10), dtype=F64)}
    v = {k: torch.randn(t.shape, dtype=F64, generator=rng) for k, t in params.items()}
    for act in (lambda: hvp(normed, params, v, "exact"), lambda: HessianOperator(normed, params), lambda: HessianOperator(normed, params, keep_graph=False, check=False) @ v):
        with pytest.raises(NotTwiceDifferentiable, match="second derivative of weight_norm is wrong on the CPU; remove the parametrization"): act()
    exact = hvp(by_hand, params, v, "exact")
    assert close(hvp(normed, params, v), exact, 1e-3) and close(FiniteDifferenceOperator(normed, params, "central") @ v, exact, 1e-5)
    rest = HessianOperator(lambda p: normed(params) * p["s"] ** 2, {"s": torch.ones((), dtype=F64)})  # it is a constant here
    assert float(rest.to_dense()) == pytest.approx(2 * float(normed(params)))


def test_checkpointed_attention_is_differentiated_twice():
    f = lambda t: checkpoint(attention, t, use_reentrant=False)
    exact = hvp(lambda t: attention(t, fused=False), T, W, "exact")
    for product in (hvp(f, T, W, "exact"), HessianOperator(f, T) @ W, HessianOperator(f, T, keep_graph=False) @ W):
        assert (product - exact).norm() < 1e-12 * exact.norm()
