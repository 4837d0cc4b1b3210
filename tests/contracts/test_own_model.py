"Operators of a model, its loss and a DataLoader against dense float64 matrices written out by hand, and what they refuse and leave alone."
import copy
import io
import random
import sys
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lal.core.device import generator, seeded
from lal.curvature.data import Examples
from lal.curvature.gauss_newton import FisherOperator, GaussNewtonOperator, JacobianOperator
from lal.curvature.hessian_operator import FiniteDifferenceOperator, HessianOperator
from lal.curvature.lanczos import eigsh
from lal.curvature.params import batch_loss, flatten, params_of, unflatten

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "data"))


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=generator(seed, "data"))


class ResNet(nn.Module):
    "A stem and one residual block, each with batch normalisation."

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3)), nn.Linear(3, 3)

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)))
        x = F.relu(x + self.norms[2](self.two(F.relu(self.norms[1](self.one(x))))))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        out, (h, c) = self.lstm(x)
        return self.head(out[:, -1]), (h, c)


def vision(training):
    model = ResNet().train(training)
    for norm in model.norms:  # running statistics that are not those of the data, and scales that are not 1
        norm.running_mean, norm.running_var = randn(3, seed=5) / 10, 1 + randn(3, seed=6).square()
    return model, TensorDataset(randn(5, 1, 4, 4), torch.arange(5) % 3)


def classes(model, batch):
    out = model(batch[0])
    return out if isinstance(out, torch.Tensor) else out[0]


def text(kind):
    "A transformers model from its configuration class, and a data set of dicts."
    import transformers

    small = dict(vocab_size=7, attn_implementation="eager")
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=4, n_layer=1, n_head=2, n_positions=4, **small)
        model = transformers.GPT2LMHeadModel(config)  # tied
        model.transformer.wpe.requires_grad_(False)
        model.transformer.h[0].ln_1.requires_grad_(False)
    elif kind == "llama":
        config = transformers.LlamaConfig(hidden_size=4, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4, **small)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(hidden_size=4, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4, num_labels=3, **small)
        model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():  # a standard deviation of 0.02 would leave nothing to see
        for i, p in enumerate(model.parameters()):
            p.add_(randn(*p.shape, seed=i) / 3)
    ids = randint(7, 5, 4)
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": torch.tensor(i % 3) if kind == "bert" else t} for i, t in enumerate(ids)]
    return model.eval(), rows


def inside(model, batch):
    "The loss that the model computes itself."
    return model(**batch).loss


def logits_of(model, batch):
    return model(**batch).logits


def entropies(z, batch):
    "The losses of the rows, [N], by the definition."
    target = batch["labels"] if isinstance(batch, dict) else batch[1]
    if z.ndim == 3:
        z, target = z[:, :-1], target[:, 1:]
    terms = -z.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return terms.reshape(len(z), -1).mean(1)


def mean_entropy(model, batch):
    return F.cross_entropy(classes(model, batch), batch[1])


CASES = {  # float32 inside a model (a loss, a normalisation) leaves its unit, 6e-8, times what the derivatives multiply it with
    "resnet, training": (lambda: vision(True), classes, mean_entropy, 1e-10),
    "resnet, evaluation": (lambda: vision(False), classes, mean_entropy, 1e-10),
    "lstm": (lambda: (Recurrent(), TensorDataset(randn(5, 3, 2), torch.arange(5) % 3)), classes, mean_entropy, 1e-10),
    "gpt2, tied and frozen": (lambda: text("gpt2"), logits_of, inside, 1e-5),
    "llama": (lambda: text("llama"), logits_of, inside, 1e-5),
    "bert": (lambda: text("bert"), logits_of, inside, 1e-5),
}


class Dense:
    "Hessian, Gauss–Newton and Fisher matrix of the mean over all batches, in float64, from the outputs of a copy of the model and the definition of the loss."

    def __init__(self, model, loader, outputs):
        self.model = copy.deepcopy(model).to(F64)
        self.free = {k: p.detach().clone() for k, p in self.model.named_parameters() if p.requires_grad}
        self.theta, self.buffers = flatten(self.free), {k: b.clone() for k, b in self.model.named_buffers()}
        self.outputs, self.H, self.G, self.F, total = outputs, 0, 0, 0, len(loader.dataset)
        for batch in loader:
            batch = {k: v for k, v in batch.items()} if isinstance(batch, dict) else [t.to(F64) if t.is_floating_point() else t for t in batch]
            self.add(batch)
        self.H, self.G, self.F = self.H / total, self.G / total, self.F / total

    def z(self, theta, batch):
        lent = unflatten(theta, self.free) | {k: b.clone() for k, b in self.buffers.items()}
        holder = nn.Module()
        holder.model, holder.forward = self.model, lambda: self.outputs(self.model, batch)
        return functional_call(holder, {f"model.{k}": t for k, t in lent.items()}, ())

    def add(self, batch):
        from torch.autograd.functional import hessian, jacobian

        z = self.z(self.theta, batch).detach()
        J = jacobian(lambda t: self.z(t, batch), self.theta).reshape(z.numel(), -1)
        inner = hessian(lambda t: entropies(t, batch).sum(), z).reshape(z.numel(), -1)
        slopes = jacobian(lambda t: entropies(self.z(t, batch), batch), self.theta)
        self.H = self.H + hessian(lambda t: entropies(self.z(t, batch), batch).sum(), self.theta)
        self.G, self.F = self.G + J.T @ inner @ J, self.F + slopes.T @ slopes


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, outputs, loss_fn, tolerance = CASES[request.param]
    with seeded(0, "init"):
        model, data = make()
    loader = DataLoader(data, batch_size=2)  # 2, 2 and 1
    return model, loader, loss_fn, Dense(model, loader, outputs), tolerance


def near(a, b, tolerance):
    return float((a - b).norm()) <= tolerance * float(b.norm())


def test_eigenvalues_and_trace(case):
    "The top, the bottom and the trace of the Hessian over a loader are those of the dense matrix."
    model, loader, loss_fn, dense, tolerance = case
    H = HessianOperator.of(model, loss_fn, loader, dtype=F64)
    assert H.shape == tuple(dense.H.shape) and list(H.params) == list(dense.free)
    exact = torch.linalg.eigvalsh(dense.H)
    largest = float(exact.abs().max())
    for which, expected in {"LA": exact.flip(0)[:2], "SA": exact[:2]}.items():
        found = eigsh(H, 2, which, tol=max(tolerance, 1e-8)).eigenvalues
        assert (found.sort().values - expected.sort().values).abs().max() <= 2 * max(tolerance, 1e-8) * largest, which
    assert abs(H.diagonal().sum() - dense.H.trace()) <= tolerance * len(exact) ** 0.5 * dense.H.norm()


def test_gauss_newton_and_fisher(case):
    "Gauss–Newton and the empirical Fisher matrix find a model's outputs by themselves."
    model, loader, loss_fn, dense, tolerance = case
    V = torch.randn(len(dense.theta), 4, dtype=F64, generator=generator(0, "probe"))
    for Operator, A in ((GaussNewtonOperator, dense.G), (FisherOperator, dense.F)):
        op = Operator.of(model, loss_fn, loader, dtype=F64)
        exact = torch.linalg.eigvalsh(A)
        assert near(op @ V, A @ V, tolerance) and near(op @ V[:, 0], A @ V[:, 0], tolerance)
        assert abs(eigsh(op, 1, "LA", tol=max(tolerance, 1e-8)).eigenvalues[0] - exact[-1]) <= 2 * max(tolerance, 1e-8) * exact[-1]
        assert near(op.diagonal(), A.diagonal(), 10 * tolerance)
    assert near(dense.F.trace(), FisherOperator.of(model, loss_fn, loader, dtype=F64).diagonal().sum(), tolerance)


def test_model_and_data_are_as_they_were(case):
    "Parameters, buffers, gradients, modes, hooks and global random states are untouched, and the matrix stays that of the moment it was made."
    model, loader, loss_fn, dense, tolerance = case
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    marks = {k: (t, t.clone(), t._version) for k, t in [*model.named_parameters(), *model.named_buffers()]}
    modes, states = [m.training for m in model.modules()], (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    v = torch.ones(len(dense.theta), dtype=F64)
    made = [Operator.of(model, loss_fn, loader, dtype=F64) for Operator in (HessianOperator, GaussNewtonOperator, FisherOperator)]
    products = [op @ v for op in made]
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(now[k] is t and torch.equal(t, old) and t._version == version for k, (t, old, version) in marks.items())
    assert all((p.grad == 1).all() for p in model.parameters()) and modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    with torch.no_grad():
        for k, (t, old, _) in marks.items():
            t.copy_(old + 1 if t.is_floating_point() else old)
    model.train(not model.training)
    assert all(torch.equal(op @ v, product) for op, product in zip(made, products))
    model.train(not model.training)
    with torch.no_grad():
        for t, old, _ in marks.values():
            t.copy_(old)
    for p in model.parameters():
        p.grad = None


# the face of a streamed operator, on a small model


def perceptron(dtype=F64):
    with seeded(0, "init"):
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


X, Y = randn(7, 2).to(F64), torch.arange(7) % 2
MODEL, LOADER, ALL = perceptron(), DataLoader(TensorDataset(X, Y), batch_size=3), (X, Y)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def logits(model, batch):
    return model(batch[0])


@pytest.mark.parametrize("Operator", [HessianOperator, GaussNewtonOperator, FisherOperator, FiniteDifferenceOperator])
def test_a_loader_is_one_large_batch(Operator):
    "Every face of the streamed operator is that of the operator of all examples in one batch."
    streamed, whole = Operator.of(MODEL, loss, LOADER), Operator.of(MODEL, loss, ALL)
    tolerance = 1e-6 if Operator is FiniteDifferenceOperator else 1e-11
    v, V = torch.randn(17, dtype=F64, generator=generator(0, "probe")), torch.randn(17, 3, dtype=F64, generator=generator(1, "probe"))
    assert near(streamed @ v, whole @ v, tolerance) and near(streamed @ V, whole @ V, tolerance)
    assert near(flatten(streamed @ unflatten(v, whole.params)), whole @ v, tolerance)
    assert near(streamed.to_dense(), whole.to_dense(), tolerance) and near(streamed.diagonal(), whole.diagonal(), tolerance)
    assert near(streamed.restrict("2").to_dense(), whole.to_dense()[9:, 9:], tolerance)
    assert near(streamed.restrict("2").restrict("2.bias").to_dense(), whole.to_dense()[15:, 15:], tolerance)
    assert np.allclose(streamed.to_scipy() @ v.numpy(), whole @ v) and streamed.T is streamed
    assert near(streamed.gradient, whole.gradient, 1e-11) and streamed.params.keys() == whole.params.keys()
    assert torch.equal(streamed @ v, streamed @ v) and torch.equal(copy.deepcopy(streamed) @ v, streamed @ v)
    assert repr(whole) in repr(streamed) and "3 batches" in repr(streamed)


def test_rows_of_all_batches():
    "The Jacobian over a loader has the rows of all batches, in their order."
    streamed, whole = JacobianOperator.of(MODEL, logits, LOADER), JacobianOperator.of(MODEL, logits, ALL)
    J, u = whole.to_dense(), torch.randn(14, dtype=F64, generator=generator(0, "probe"))
    assert streamed.shape == (14, 17) and near(streamed.to_dense(), J, 1e-12)
    assert near(streamed @ u.new_ones(17), J.sum(1), 1e-12) and near(streamed.T @ u, J.T @ u, 1e-12)
    assert near(streamed.restrict("0").to_dense(), J[:, :9], 1e-12) and near(streamed.T.to_dense(), J.T, 1e-12)
    with pytest.raises(ValueError, match="not square"):
        streamed.diagonal()


def test_one_graph_at_a_time():
    "While a product streams, no more than one batch's graph is alive."
    alive, most = [], []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.token = Token()
            return t * 1

        @staticmethod
        def backward(ctx, g):
            ctx.token
            return g * 1

    class Token:
        def __init__(self):
            alive.append(1)
            most.append(len(alive))

        def __del__(self):
            alive.pop()

    model = nn.Linear(2, 2, dtype=F64)
    for Operator in (HessianOperator, GaussNewtonOperator, FisherOperator):
        op = Operator.of(model, lambda m, b: F.cross_entropy(Counted.apply(m(b[0])), b[1]), LOADER)
        assert not alive, f"{Operator.__name__} keeps a graph when it is built"
        most.clear()
        op @ torch.ones(6, dtype=F64), op @ torch.ones(6, 3, dtype=F64), op.diagonal()
        assert max(most) == 1 and not alive and len(most) == 9, f"{Operator.__name__}: {len(most)} graphs"


def test_dtypes():
    "The model's own dtype, or another one that parameters, buffers and floating inputs follow."
    narrow = perceptron(torch.float32)
    batch = (X.float(), Y)
    op, wide = HessianOperator.of(narrow, loss, batch), HessianOperator.of(narrow, loss, batch, dtype=F64)
    assert op.dtype == torch.float32 and wide.dtype == F64 and near(op.to_dense().double(), wide.to_dense(), 1e-5)


@pytest.mark.parametrize("kind", ["dict", "UserDict", "dataclass", "nested"])
def test_nests(kind):
    "Batches and outputs of any kind, several inputs, tuples in dicts."

    @dataclass
    class Batch:
        x: torch.Tensor
        y: torch.Tensor

        def __getitem__(self, key):
            return getattr(self, key)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = perceptron()

        def forward(self, x, scale):
            z = self.inner(x) * scale
            return {"tuple": (z, None), "hidden": x, "scalar": z.sum()}

    make = {"dict": dict, "UserDict": UserDict, "dataclass": Batch, "nested": lambda **kw: {**kw, "more": [(X, "text")]}}[kind]
    model, batch = Outer(), make(x=X, y=Y)

    def fit(m, b):
        return F.cross_entropy(m(b["x"], scale=2)["tuple"][0], b["y"])

    f = lambda m, b: F.cross_entropy(2 * m(b[0]), b[1])
    for Operator in (HessianOperator, GaussNewtonOperator, FisherOperator):
        assert near(Operator.of(model, fit, batch).to_dense(), Operator.of(MODEL, f, ALL).to_dense(), 1e-12)
    rows = [make(x=x, y=y) for x, y in zip(X, Y)]
    loader = DataLoader(rows, batch_size=3, collate_fn=lambda some: make(x=torch.stack([s["x"] for s in some]), y=torch.stack([s["y"] for s in some])))
    if kind != "nested":
        assert near(HessianOperator.of(model, fit, loader).to_dense(), HessianOperator.of(MODEL, f, ALL).to_dense(), 1e-11)


def test_transformers_batches_and_caches():
    "A BatchEncoding is a batch, and hidden states and caches in an output are not taken for outputs."
    from transformers import BatchEncoding

    model, rows = text("gpt2")
    batch = BatchEncoding({k: torch.stack([r[k] for r in rows]) for k in rows[0]})
    plain = GaussNewtonOperator.of(model, inside, dict(batch), dtype=F64)

    def generous(m, b):
        return m(**b, output_hidden_states=True, output_attentions=True, use_cache=True).loss

    v = torch.ones(plain.shape[1], dtype=F64)
    assert near(GaussNewtonOperator.of(model, generous, batch, dtype=F64) @ v, plain @ v, 1e-6)
    assert near(HessianOperator.of(model, generous, batch, dtype=F64) @ v, HessianOperator.of(model, inside, dict(batch), dtype=F64) @ v, 1e-6)


def test_fused_attention_is_evaluated_unfused():
    "Jacobian and Gauss–Newton of a model with fused attention are those of the same attention written out."

    def fused(p):
        return F.scaled_dot_product_attention(p["q"], p["k"], p["k"]).square()

    def written(p):
        return ((p["q"] @ p["k"].mT / 8**0.5).softmax(-1) @ p["k"]).square()

    p = {k: randn(1, 1, 4, 8, seed=i) for i, k in enumerate("qk")}
    v = torch.ones(64)
    assert near(JacobianOperator(fused, p) @ v, JacobianOperator(written, p) @ v, 1e-5)
    G, same = (GaussNewtonOperator(h, lambda z: z.exp().sum(), p) for h in (fused, written))
    assert near(G @ v, same @ v, 1e-5)


# the same batches at every pass


class Augmented(Dataset):
    "Every example comes with noise, from whatever draws it."

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[i] + self.draw(), Y[i]


DRAWS = {
    "torch": lambda: torch.rand(2, dtype=F64),
    "numpy": lambda: torch.from_numpy(np.random.rand(2)),
    "python": lambda: random.random(),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("own", [None, 3])
def test_shuffling_and_augmenting_repeat(draw, own):
    "Order and noise from generators that can be set are the same at every product, and neither they nor the loader's generator move."
    g = None if own is None else torch.Generator().manual_seed(own)
    loader = DataLoader(Augmented(DRAWS[draw]), batch_size=4, shuffle=True, generator=g)
    op = HessianOperator.of(MODEL, loss, loader)
    states = lambda: (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), g.get_state() if g else None)
    before, v = states(), torch.ones(17, dtype=F64)
    first = op @ v
    after = states()
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all() and (g is None or torch.equal(before[3], after[3]))
    torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(op @ v, first), "whatever the caller draws in between"
    order = [b[1].tolist() for _, b in op.examples]
    assert order != [b[1].tolist() for b in loader] or order != [b[1].tolist() for b in loader], "and the loader itself goes on shuffling"


def test_workers():
    "Workers are seeded alike at every pass."
    op = HessianOperator.of(MODEL, loss, DataLoader(Augmented(DRAWS["torch"]), batch_size=4, shuffle=True, num_workers=1))
    assert torch.equal(op @ torch.ones(17, dtype=F64), op @ torch.ones(17, dtype=F64))


class Once(IterableDataset):
    "An iterator that does not begin again."

    def __init__(self):
        self.rows = iter(list(zip(X, Y)))

    def __iter__(self):
        return self.rows


class Failing(Dataset):
    "Examples that are others from the third pass on."

    count = 0

    def __len__(self):
        return 2

    def __getitem__(self, i):
        self.count += 1
        return X[i] + (self.count > 2 * 3), Y[i]


def test_batches_that_change_later():
    "A data set that changes after the construction is refused at the product."
    op = HessianOperator.of(MODEL, loss, DataLoader(Failing(), batch_size=2))
    with pytest.raises(ValueError, match="batch 1 of the loader is another one"):
        op @ torch.ones(17, dtype=F64)


def test_a_bar_on_a_terminal_alone(monkeypatch):
    "A pass that takes long shows a bar where stderr is a terminal, and nothing in a pipe."

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    examples = Examples(LOADER)
    for stream, progress, shown in ((io.StringIO(), True, False), (Terminal(), False, False), (Terminal(), True, True)):
        monkeypatch.setattr(sys, "stderr", stream)
        examples.progress, examples.seconds = progress, 2.0
        for _ in examples:
            pass
        assert ("over the data" in stream.getvalue()) == shown


def test_weights_by_tokens():
    "A loss that is a mean over something else than rows is weighed by `size`."
    table = nn.Embedding(5, 5, dtype=F64)
    ids, mask = randint(5, 5, 4), randint(2, 5, 4, seed=1)
    mask[:, 0] = 1

    def per_token(m, b):
        z, keep = m(b[0]), b[1].bool()
        return F.cross_entropy(z[keep], b[0][keep])

    loader = DataLoader(TensorDataset(ids, mask), batch_size=2)
    streamed = HessianOperator.of(table, per_token, loader, size=lambda b: b[1].sum())
    assert near(streamed.to_dense(), HessianOperator.of(table, per_token, (ids, mask)).to_dense(), 1e-11)


def test_frozen_and_tied():
    "Frozen parameters are held where they are, tied ones appear once, and `.restrict` takes names of what is left."
    model = perceptron()
    model[0].weight.requires_grad_(False)
    part, whole = HessianOperator.of(model, loss, LOADER), HessianOperator.of(MODEL, loss, ALL).to_dense()
    assert list(part.params) == ["0.bias", "2.weight", "2.bias"] and near(part.to_dense(), whole[6:, 6:], 1e-11)
    with pytest.raises(ValueError, match="no parameter is called '0.weight'"):
        part.restrict("0.weight")
    tied = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).to(F64)
    tied[2].weight = tied[0].weight
    assert list(HessianOperator.of(tied, loss, LOADER).params) == ["0.weight", "0.bias", "2.bias"]


def decayed(model, batch):
    return loss(model, batch) + 1e-5 * sum(p.square().sum() for p in model.parameters())


def contrastive(model, batch):
    z = model(batch[0])
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def around(model, batch):
    "A loss of the outputs and of what lies behind them."
    return loss(model, batch) + model[0](batch[0]).square().mean()


class Probing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 3, dtype=F64), nn.Linear(3, 2, dtype=F64)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return {"hidden": hidden, "logits": self.head(hidden)}


def both_uses(m, b):
    out = m(b[0])
    return F.cross_entropy(out["logits"], b[1]) + out["hidden"].square().mean()


FROZEN, DROPPING, PROBING = perceptron().requires_grad_(False), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).to(F64), Probing()
ITERATOR = iter(LOADER)
REFUSED = {
    "hidden randomness": (lambda: HessianOperator.of(MODEL, loss, DataLoader(Augmented(np.random.default_rng(0).random), batch_size=3)), "another one in a second pass"),
    "an iterator inside": (lambda: HessianOperator.of(MODEL, loss, DataLoader(Once(), batch_size=3)), "ends after batch 0 of 3"),
    "an iterator": (lambda: HessianOperator.of(MODEL, loss, ITERATOR), "pass a batch"),
    "no tensors": (lambda: HessianOperator.of(MODEL, loss, {"a": "text"}), "has no tensor"),
    "an empty loader": (lambda: HessianOperator.of(MODEL, loss, DataLoader(TensorDataset(X[:0], Y[:0]))), "no examples"),
    "two sizes": (lambda: HessianOperator.of(MODEL, loss, DataLoader([(X, Y[:3])], batch_size=None)), "pass size"),
    "dropout": (lambda: HessianOperator.of(DROPPING, loss, LOADER), r"model.eval\(\)"),
    "dropout, Gauss–Newton": (lambda: GaussNewtonOperator.of(DROPPING, loss, LOADER), r"model.eval\(\)"),
    "all frozen": (lambda: HessianOperator.of(FROZEN, loss, LOADER), "no trainable parameters"),
    "no module": (lambda: HessianOperator.of(loss, MODEL, LOADER), "not a torch module"),
    "an order": (lambda: GaussNewtonOperator.of(MODEL, LOADER, loss), "the order being"),
    "per-example losses": (lambda: HessianOperator.of(MODEL, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), LOADER), "scalar"),
    "per-example losses, Gauss–Newton": (lambda: GaussNewtonOperator.of(MODEL, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), LOADER), "scalar"),
    "weight decay": (lambda: GaussNewtonOperator.of(MODEL, decayed, LOADER), "take that part out"),
    "weight decay, Fisher": (lambda: FisherOperator.of(MODEL, decayed, LOADER), "take that part out"),
    "around the outputs": (lambda: GaussNewtonOperator.of(MODEL, around, ALL), "take that part out"),
    "hidden states used": (lambda: GaussNewtonOperator.of(PROBING, both_uses, ALL), "pass outputs"),
    "no call": (lambda: GaussNewtonOperator.of(MODEL, lambda m, b: m[0].weight.square().sum(), ALL), "calls no model"),
    "a loss for an output": (lambda: GaussNewtonOperator.of(MODEL, lambda m, b: m(b[0]).detach().sum() + m[0].bias.sum(), ALL), "uses no tensor"),
    "no gradient": (lambda: GaussNewtonOperator.of(MODEL, lambda m, b: m(b[0]).detach().sum(), ALL), "does not depend"),
    "rows that meet": (lambda: FisherOperator.of(MODEL, contrastive, ALL), "part in the loss of another"),
    "other rows": (lambda: FisherOperator.of(nn.Sequential(MODEL, nn.Flatten(0)), lambda m, b: m(b[0]).square().mean(), ALL), "one loss an example"),
    "a partial dict": (lambda: batch_loss(MODEL, loss, ALL)({"2.bias": params_of(MODEL)["2.bias"]}), "op.restrict"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_refused_in_one_sentence(label):
    "Misuse is one clear error that names the way out, and moves nothing."
    act, says = REFUSED[label]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=says) as caught:
        act()
    assert "\n" not in str(caught.value) and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in MODEL.modules())


def test_outputs_are_chosen():
    "`outputs` picks the cut: logits or, where the loss is of both, what lies behind is refused and a part of the loss accepted."
    model = PROBING
    at_logits = GaussNewtonOperator.of(model, lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1]), ALL)
    chosen = GaussNewtonOperator.of(model, lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1]), ALL, outputs=lambda out: out["logits"])
    assert torch.equal(chosen.to_dense(), at_logits.to_dense())
    body = GaussNewtonOperator.of(model, lambda m, b: m(b[0])["hidden"].square().mean(), ALL)
    J = JacobianOperator.of(model, lambda m, b: m(b[0])["hidden"], ALL).to_dense()
    assert near(body.to_dense(), 2 / 21 * J.T @ J, 1e-11)


def test_several_outputs():
    "A model that is run twice, and outputs that are parts of one tensor, have Gauss–Newton matrices of all they give."
    A, B = X, X.flip(1)

    def twice(m, b):
        return (m(b[0]) * m(b[1])).sum(1).exp().mean()

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MODEL

        def forward(self, x):
            return self.inner(x).unbind(1)

    pair = GaussNewtonOperator(lambda p: torch.stack([functional_call(MODEL, p, (t,)) for t in (A, B)]), lambda z: (z[0] * z[1]).sum(1).exp().mean(), params_of(MODEL))
    assert near(GaussNewtonOperator.of(MODEL, twice, (A, B)).to_dense(), pair.to_dense(), 1e-11)
    parts = GaussNewtonOperator.of(Split(), lambda m, b: F.cross_entropy(torch.stack(m(b[0]), 1), b[1]), ALL)
    one = GaussNewtonOperator.of(Split(), lambda m, b: m(b[0])[0].square().mean(), ALL)
    assert len(parts._kept().J.z) == 2 and len(one._kept().J.z) == 1
    assert near(parts.to_dense(), GaussNewtonOperator.of(MODEL, loss, ALL).to_dense(), 1e-11)


def test_a_minimum_is_no_penalty():
    "Where the examples' gradients cancel to rounding, nothing is taken for a part of the loss beside the outputs."
    x, y = randn(40, 3), randn(40, 2, seed=1)
    model = nn.Linear(3, 2)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:3].T), model.bias.copy_(solution[3])
    for Operator in (GaussNewtonOperator, FisherOperator):
        op = Operator.of(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), (x, y))
        assert op.gradient.norm() < 1e-5
    with pytest.raises(ValueError, match="take that part out"):
        GaussNewtonOperator.of(model, lambda m, b: F.mse_loss(m(b[0]), b[1]) + 1e-3 * m.weight.square().sum(), (x, y))
