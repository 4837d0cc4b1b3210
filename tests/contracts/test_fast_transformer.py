"The transformer computes each distinct state once. It is the plain transformer: values, gradients, second derivatives, alone and under vmap."
from itertools import product
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp, vmap
from lal.core.device import deterministic, generator, seeded
from lal.modular.models import GrokTransformer
from lal.modular.task import OPERATIONS, Task, encode, examples

P, WIDTH = 5, 8
LARGE, SMALL = 18, 4  # on either side of P, and of 2 P, the prefixes of `both`
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
MODELS = list(product(OPERATIONS, (False, True), (1, 2, 3)))
every_model = pytest.mark.parametrize("operation, tied, layers", MODELS)


class Plain(GrokTransformer):
    def representation(self, x):
        return self.last_state(self.embed(x))


def make(Model, operation, tied, layers, dtype=torch.float64):
    with seeded(1, "init"):
        return Model(Task(P, operation), WIDTH, layers, 4, tied).to(dtype)


def pair(*architecture):
    return make(GrokTransformer, *architecture), make(Plain, *architecture)


def batch(operation, size):
    "Examples of every operation, in random order."
    task = Task(P, operation)
    codes = torch.randperm(task.n_pairs, generator=generator(size, "order"))
    chosen = examples(task, codes[:size])
    return encode(chosen, "tokens"), chosen.y


def parameters(model):
    return {name: t.detach() for name, t in model.named_parameters()}


def loss(params, model, x, y):
    return F.cross_entropy(functional_call(model, params, (x,)), y)


def apart(fast: dict, plain: dict) -> float:
    "The largest difference, each tensor relative to its own largest entry."
    assert fast.keys() == plain.keys()
    return max(float((fast[k] - g).abs().max() / g.abs().max()) for k, g in plain.items())


def logits_and_gradients(model, x, y):
    logits = model(x)
    slopes = torch.autograd.grad(F.cross_entropy(logits, y), list(model.parameters()))
    return {"logits": logits.detach(), "representation": model.representation(x).detach(), **dict(zip(parameters(model), slopes))}


def both_ways(function, architecture, dtype=torch.float64) -> float:
    return apart(*(function(model) for model in pair(*architecture, dtype)))


@pytest.mark.parametrize("operation, prefixes", [("add", P), ("divide", P), ("both", 2 * P)])
def test_the_shape_of_the_batch_decides_between_a_table_and_own_prefixes(operation, prefixes):
    model = make(GrokTransformer, operation, False, 1)
    sizes = lambda n: [len(h) for h in model.distinct(batch(operation, n)[0])[0]]
    assert sizes(prefixes) == [prefixes, prefixes, P, 1]
    assert sizes(prefixes - 1) == [prefixes - 1] * 3 + [1]


def test_embeddings_take_the_plain_path():
    x, _ = batch("both", LARGE)
    fast, plain = pair("both", True, 2)
    assert torch.equal(fast.forward_from_embeddings(fast.embed(x)), plain(x))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_model
def test_logits_and_gradients(operation, tied, layers, dtype):
    for size in (LARGE, SMALL, 1):
        x, y = batch(operation, size)
        fast, plain = (logits_and_gradients(m, x, y) for m in pair(operation, tied, layers, dtype))
        assert apart(fast, plain) < TOLERANCE[dtype], f"N = {size}"


@every_model
def test_vmap_over_examples(operation, tied, layers):
    x, y = batch(operation, LARGE)
    each = vmap(grad(loss), in_dims=(None, None, 0, 0))
    assert both_ways(lambda m: each(parameters(m), m, x[:, None], y[:, None]), (operation, tied, layers)) < 1e-12


@every_model
def test_vmap_over_batches_larger_than_the_table(operation, tied, layers):
    x, y = batch(operation, 20)
    x, y = torch.stack([x, x.flip(0)]), torch.stack([y, y.flip(0)])
    each = vmap(grad(loss), in_dims=(None, None, 0, 0))
    assert both_ways(lambda m: each(parameters(m), m, x, y), (operation, tied, layers)) < 1e-12


@every_model
def test_vmap_over_parameters(operation, tied, layers):
    each = vmap(grad(loss), in_dims=(0, None, None, None))
    for size in (LARGE, SMALL):
        x, y = batch(operation, size)

        def gradients(model):
            stacked = {k: torch.stack([t, 1.1 * t]) for k, t in parameters(model).items()}
            return each(stacked, model, x, y)

        assert both_ways(gradients, (operation, tied, layers)) < 1e-12, f"N = {size}"


@every_model
def test_hessian_vector_products(operation, tied, layers):
    for size in (LARGE, SMALL):
        x, y = batch(operation, size)

        def forward_through_backward(model):
            params = parameters(model)
            direction = {k: torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for k, t in params.items()}
            return jvp(lambda p: grad(loss)(p, model, x, y), (params,), (direction,))[1]

        def backward_twice(model):
            params = list(model.parameters())
            slopes = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
            along = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).reshape(g.shape)).sum() for g in slopes)
            return dict(zip(parameters(model), torch.autograd.grad(along, params)))

        fast, plain = pair(operation, tied, layers)
        expected = forward_through_backward(plain)
        for way in (forward_through_backward, backward_twice):
            assert apart(way(fast), expected) < 1e-10, f"{way.__name__}, N = {size}"


@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_hessian_and_per_example_jacobian(size):
    x, y = batch("both", size)
    name = "blocks.0.attention.qkv.bias"

    def derivatives(model):
        params = parameters(model)
        inner = lambda t: loss({**params, name: t}, model, x, y)
        outputs = lambda t: functional_call(model, {**params, name: t}, (x,))
        return {"hessian": torch.func.hessian(inner)(params[name]), "jacobian": torch.func.jacrev(outputs)(params[name])}

    assert both_ways(derivatives, ("both", False, 2)) < 1e-10


def test_the_gradient_is_the_same_bits_every_time_in_deterministic_mode():
    x, y = batch("both", LARGE)
    model = make(GrokTransformer, "both", True, 2, torch.float32)
    with deterministic():
        first, second = (logits_and_gradients(model, x, y) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_weights_of_a_seed_are_those_of_the_plain_model():
    fast, plain = pair("both", False, 2)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fast.parameters(), plain.parameters()))


@pytest.mark.parametrize("wrong", [lambda x: x[:, :3], lambda x: x[0], lambda x: x.double(), lambda x: F.pad(x, (0, 1)), lambda x: x > 0], ids=["narrow", "flat", "float", "wide", "bool"])
def test_what_is_no_tokens_is_refused(wrong):
    x, _ = batch("add", LARGE)
    model = make(GrokTransformer, "add", False, 1)
    for call in (model, model.representation, model.embed):
        with pytest.raises(ValueError, match=r"x must be tokens .* \[N, 4\]"):
            call(wrong(x))
