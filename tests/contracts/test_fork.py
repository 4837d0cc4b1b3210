"A fork of training: the twin steps as training will, and nothing outside the block notices."
import random
import warnings
import numpy as np
import pytest
import torch
from torch import nn
from lal.core.device import rng_states
from lal.core.experiment import find_experiment
from lal.core.files import digest
from lal.core.state import Batches, TrainState, take_rows, train_step
from lal.hooks.guard import fingerprint
from lal.hooks.hook import Hook
from lal.hooks.runner import Hooks

from test_hooks import OF_TRAINING, UNITS, configure, dropout, each_unit, equal_checkpoints, noisy, table_of_tokens, watched

CPU = torch.device("cpu")
STEPS = 6


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


class Tied(nn.Module):
    "Two layers that share their weight, one that is frozen, running statistics and two dropouts."

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.frozen, self.two = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)
        self.two.weight, self.fixed = self.one.weight, nn.BatchNorm1d(6).eval()
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(6, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        x = self.drop(self.norm(self.one(x)).tanh())
        return self.head(self.drop(self.fixed(self.two(self.frozen(x))).relu()))

    @property
    def token_embedding(self):
        "For hooks that ask for a table of tokens."
        return self.one.weight


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "two groups": lambda p: torch.optim.AdamW([dict(params=p[:2], lr=0.1), dict(params=p[2:])], lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}
ONE = torch.optim.lr_scheduler
SCHEDULES = {
    "none": lambda o: None,
    "lambda": lambda o: ONE.LambdaLR(o, lambda t: 1 / (t + 1)),
    "cosine": lambda o: ONE.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: ONE.OneCycleLR(o, 0.1, total_steps=50),
    "warm-up, then a decay": lambda o: ONE.SequentialLR(o, [ONE.LinearLR(o, 0.1, total_iters=4), ONE.ExponentialLR(o, 0.9)], [4]),
    "two chained": lambda o: ONE.ChainedScheduler([ONE.ExponentialLR(o, 0.9), ONE.ConstantLR(o, 0.5, 3)], o),
}


def make(optimizer="momentum", schedule="lambda", clip=0.5, trained=0):
    "A state after so many steps, its schedule moving with each."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Tied(), torch.randn(50, 6), torch.randn(50, 2)
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    state = TrainState(model, made, SCHEDULES[schedule](made), Batches.shuffled((x, y), 8, 1), squared)
    state.grad_clip, state.unit = clip, None if state.scheduler is None else "step"
    make_steps(state, trained)
    return state


def make_steps(state, n):
    "What the step loop does."
    losses = []
    for _ in range(n):
        train_step(state, state.batches.of_stream(), state.grad_clip)
        if state.scheduler is not None: state.scheduler.step()
        losses.append(state.loss)
    return losses


def everything(state):
    "All that the next step depends on, by value."
    schedule = state.scheduler and {k: v for k, v in state.scheduler.state_dict().items() if k not in ("lr_lambdas", "_schedulers")}
    return digest([dict(state.model.named_parameters()), dict(state.model.named_buffers()), state.optimizer.state_dict(), schedule and repr(schedule),
                   state.batches and state.batches.state_dict(), [p.grad for p in state.model.parameters()], [m.training for m in state.model.modules()]])


def outside(state):
    "All that a fork must leave: values, identities, version counters and every global generator."
    things = [*state.model.parameters(), *state.model.buffers(), *(p.grad for p in state.model.parameters() if p.grad is not None)]
    things += [t for s in state.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    order = state.batches and (id(state.batches._iterator), id(state.batches._order), state.batches.position)
    drawn = rng_states(CPU), np.random.get_state()[1].tobytes(), hash(random.getstate())
    calls = [len(m._forward_hooks) for m in state.model.modules()]
    return everything(state), [(id(t), t._version, t.requires_grad) for t in things], order, digest(drawn[0]), drawn[1:], calls, id(state.optimizer), state.step, id(state.loss)


# 1. The twin steps as training will.


@pytest.mark.parametrize("trained", [0, 3], ids=["at the start", "later"])
@pytest.mark.parametrize("optimizer, schedule", [*((o, "lambda") for o in OPTIMIZERS), *(("momentum", s) for s in SCHEDULES)])
def test_given_the_batches_to_come_the_twin_ends_where_training_will(optimizer, schedule, trained):
    state = make(optimizer, schedule, trained=trained)
    before = outside(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with state.fork() as twin:
            ahead = twin.run(twin.batches.of_stream() for _ in range(STEPS))
            found, drawn = everything(twin), twin.rng
            assert twin.step == trained + STEPS
    assert outside(state) == before
    losses = make_steps(state, STEPS)
    assert [float(a) for a in ahead] == [float(b) for b in losses] and len(ahead) == STEPS
    assert everything(state) == found and torch.equal(drawn[0]["cpu"], torch.get_rng_state())


def test_an_epoch_of_a_run_by_epochs_ends_where_training_will_when_the_schedule_is_moved(dropout):
    keys = dict(warmup_epochs=3, scheduler="cosine", min_lr=1e-4, grad_clip=0.2)
    state = find_experiment("modular").build(configure(**keys), CPU)
    with state.fork() as twin:
        for _ in range(2):
            losses = twin.run(twin.batches.of_epoch() for _ in range(4))
            twin.scheduler.step()
        assert twin.batches.at_start and twin.batches.passes == 2 and twin.grad_clip == 0.2 and len(losses) == 4
        found = everything(twin)
    for k in range(8):
        train_step(state, state.batches.of_epoch(), 0.2)
        if k % 4 == 3: state.scheduler.step()
    assert everything(state) == found


@pytest.mark.parametrize("ordering", ["random", "fixed-random", "stride", "target"])
def test_a_copy_of_the_batches_gives_those_to_come_from_anywhere_in_a_pass(ordering):
    batches = find_experiment("modular").build(configure(ordering=ordering), CPU).batches
    for k in range(9):
        again = batches.copy().copy()
        first, *rest = (again.of_epoch() for _ in range(6))
        ahead = digest([first, *rest])
        before = digest(batches.state_dict())
        later = batches.copy()
        assert digest([later.of_epoch() for _ in range(6)]) == ahead and digest(batches.state_dict()) == before
        assert digest(batches.of_epoch()) == digest(first)


# 2. Nothing outside notices.


class Odd(Exception):
    "Raised half-way."


def test_whatever_happens_in_the_block_everything_outside_is_as_it_was():
    state = make("fused adamw", trained=3)
    before, batch, calls = outside(state), state.batch, []

    def failing(model, batch):
        calls.append(torch.rand(()))
        if len(calls) > 2: raise Odd
        return squared(model, batch)

    with pytest.raises(Odd):
        with state.fork() as twin:
            twin.loss_fn = failing
            twin.run([batch] * 5)
    with pytest.raises(Odd):
        with state.fork() as twin:
            twin.run([batch] * 2)
            torch.manual_seed(3), random.seed(3), np.random.seed(3)
            twin.model.eval().requires_grad_(False).double()
            for group in twin.optimizer.param_groups: group["lr"] = 7.0
            twin.batches.of_stream()
            raise Odd
    with pytest.raises(Odd):
        with state.fork() as twin:
            twin.run(b if k < 2 else failing(twin.model, b) for k, b in enumerate([batch] * 3))
    assert len(calls) == 4 and outside(state) == before


def test_forks_one_after_another_and_one_within_another_are_the_same_twin():
    state = make(trained=2)
    before, ends = outside(state), []
    batches = [state.batches.copy().of_stream() for _ in range(3)]
    for _ in range(2):
        with state.fork() as twin:
            twin.run(batches[:1])
            with twin.fork() as inner:
                inner.run(batches[1:])
                ends.append(everything(inner))
                with state.fork() as third:
                    third.run(batches)
                    ends.append(everything(third))
            torch.rand(5), random.random()  # of somebody else, in the block
            twin.run(batches[1:])
            ends.append(everything(twin))
    assert len({*ends}) == 1 and len(ends) == 6 and outside(state) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_are_recorded_the_twin_steps_all_the_same(mode):
    state = make(trained=2)
    with state.fork() as twin:
        losses = twin.run([state.batch] * 2)
        expected = everything(twin)
    with mode(), state.fork() as twin:
        again = twin.run([state.batch] * 2)
        found = everything(twin)
    assert found == expected and [*map(float, losses)] == [*map(float, again)]


def test_batches_that_are_drawn_within_run_are_drawn_from_the_twins_generators():
    state, before = make(trained=1), torch.get_rng_state()
    x, y = state.batches.data
    draw = lambda: [(x[i], y[i]) for i in [torch.randperm(50)[:8]]][0]
    with state.fork() as twin:
        ahead = twin.run(draw() for _ in range(3))
    assert torch.equal(torch.get_rng_state(), before)
    for k in range(3):
        train_step(state, draw(), 0.5)
        state.scheduler.step()
        assert float(state.loss) == float(ahead[k])


def test_a_loader_is_walked_as_the_loop_would_walk_it():
    state = make(trained=1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*state.batches.data), 8, shuffle=True)
    state.batches, state.unit = None, None
    with state.fork() as twin: ahead = twin.run(loader)
    for k, batch in enumerate(loader):
        train_step(state, batch, 0.5)
        assert float(state.loss) == float(ahead[k])
    assert len(ahead) == k + 1 == 7


def test_its_memory_is_what_it_says_and_goes_with_the_block():
    import gc, weakref
    count = sum(p.numel() for p in Tied().parameters())
    trained = sum(p.numel() for p in Tied().parameters() if p.requires_grad)
    buffers = sum(t.nbytes for t in Tied().buffers())
    gc.disable()
    try:
        for optimizer, moments in (("sgd", 0), ("momentum", 1), ("fused adamw", 2)):
            state = make(optimizer, trained=1)
            moved = sum(p.numel() for p in state.model.parameters() if p.grad is not None)
            scalars = 4 * (moments == 2) * sum(p.grad is not None for p in state.model.parameters())
            with state.fork() as twin:
                assert twin.bytes == 4 * (count + trained + moments * moved) + buffers + scalars
                twin.run([state.batch])
                gone = [weakref.ref(t) for t in (twin.model, twin.model.head.weight, twin.optimizer, twin.scheduler, twin.model.head.weight.grad)]
                assert all(ref() is not None for ref in gone)
            assert [ref() for ref in gone] == [None] * 5, optimizer
    finally:
        gc.enable()


# 3. At every event of a run.


class Forking(Hook):
    "Runs shuffled orders at each event; before a step also the step itself."

    kind, ahead, fired = "intervention", None, 0

    def forked(self, state):
        self.fired += 1
        for k in range(2):
            order = torch.randperm(state.batches.n, generator=state.generator(f"order {k}"))
            with state.fork() as twin:
                losses = twin.run(take_rows(state.batches.data, i) for i in order.split(10))
                assert len(losses) == 4 and not self.same(twin.params(), state.params())

    def same(self, one, two):
        return all(torch.equal(one[k], two[k]) for k in two)

    def pre_epoch(self, state): self.forked(state)
    def post_epoch(self, state): self.forked(state)
    def snapshot(self, state): self.forked(state)

    def pre_step(self, state):
        self.forked(state)
        with state.fork() as twin:
            loss, = twin.run([state.batch])
            self.ahead = twin.params() | {"the loss": loss}

    def post_step(self, state):
        self.forked(state)
        assert self.same(self.ahead, state.params() | {"the loss": state.loss})
        self.ahead = None


@each_unit
def test_a_hook_that_forks_at_every_event_changes_no_bit_of_the_run(unit, noisy, tmp_path):
    keys = dict(UNITS[unit], min_lr=1e-3, snapshot_every=2, checkpoint_every=5, log_every=3, grad_clip=0.3, **{f"warmup_{unit}s": 5}, scheduler="cosine")
    hook = Forking(every_n_steps=1, every_n_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone, unseen = watched(configure(unit, name="alone", **keys), tmp_path, None)
        seen_by, seen = watched(configure(unit, name="seen", **keys), tmp_path, Hooks([hook]))
    equal_checkpoints(tmp_path / "alone", tmp_path / "seen", OF_TRAINING)
    assert digest(alone.state.checkpoint()) == digest(seen_by.state.checkpoint()) and seen == unseen
    assert hook.fired == (60 * 2 + 15 * 2 + 7 if unit == "epoch" else 60 * 2 + 30)


@each_unit
@pytest.mark.parametrize("trained", [0, 6])
def test_the_fingerprint_of_the_guard_is_the_same_after_a_fork(unit, trained, noisy):
    state = find_experiment("modular").build(configure(unit, grad_clip=0.1), CPU)
    for _ in range(trained): train_step(state, state.batches.of_stream(), 0.1)
    before = fingerprint(state)
    with state.fork() as twin: twin.run(twin.batches.of_stream() for _ in range(5))
    assert fingerprint(state) == before


# 4. A loop of one's own.


def of_ones_own():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return TrainState.of(model, optimizer, loss_fn=lambda model, x: model(x).square().mean())


def test_a_loop_without_batches_and_schedule_has_a_fork_at_a_constant_rate():
    state, x = of_ones_own(), torch.ones(4, 3)
    assert state.scheduler is state.batches is state.unit is None and state.device == CPU
    with state.fork() as twin:
        ahead = twin.run([x, x, 2 * x])
        assert twin.batches is twin.scheduler is None
    for k, batch in enumerate([x, x, 2 * x]):
        train_step(state, batch)
        assert float(state.loss) == float(ahead[k]) and state.lr == 0.1
    assert not hasattr(state.optimizer.step, "_wrapped_by_lr_sched")  # the loop's own optimizer is left alone


def test_the_device_is_the_models_or_that_of_the_data():
    batches = Batches.shuffled(torch.ones(3), 1, 0)
    meta = nn.Linear(2, 2, device="meta")
    assert TrainState.of(meta, None, batches).device.type == "meta"
    assert TrainState.of(nn.BatchNorm1d(2, affine=False, device="meta"), None, batches).device.type == "meta"
    assert TrainState.of(nn.Tanh(), None, batches).device == CPU


# 5. What others attached, and what is refused.


class Recorder:
    def __init__(self): self.seen = []
    def watch(self, module, inputs, output): self.seen.append(len(output))


def test_hooks_of_modules_act_in_the_twin_and_objects_among_them_are_copied():
    state, mine, shared = of_ones_own(), Recorder(), []
    state.model[0].register_forward_hook(mine.watch)
    state.model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    state.model[0].register_forward_hook(lambda *_: shared.append(1))
    with state.fork() as twin: ahead = twin.run([torch.ones(4, 3)] * 2)
    assert mine.seen == [] and shared == [1, 1]
    for k in range(2):
        train_step(state, torch.ones(4, 3))
        assert float(state.loss) == float(ahead[k])


def non_leaf(s): s.model[0].cache = s.model[0].weight * 2
def buffer(s): s.model[2].register_buffer("old", s.model[2].weight * 2)
def lock(s): s.model[1].lock = __import__("threading").Lock()
def file(s): s.optimizer.param_groups[0]["log"] = open(__file__)
def gradient(s): s.model[2].bias.register_hook(lambda g: 2 * g)
def accumulated(s): s.model[2].bias.register_post_accumulate_grad_hook(lambda p: None)
def stepped(s): s.optimizer.register_step_post_hook(lambda *_: None)


REFUSED = [(non_leaf, "0.cache can't be copied"), (buffer, "2.old can't be copied"), (lock, "1.lock can't be copied"), (file, "the optimizer can't be copied"),
           (gradient, "registered on 2.bias"), (accumulated, "registered on 2.bias"), (stepped, "registered on the optimizer")]


@pytest.mark.parametrize("spoil, words", REFUSED, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_has_no_copy_is_named_in_one_sentence(spoil, words):
    state = of_ones_own()
    spoil(state)
    before = torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        with state.fork(): pass
    assert words in str(error.value) and "\n" not in str(error.value) and torch.equal(before, torch.get_rng_state())


def test_a_loss_of_the_live_model_is_refused_and_leaves_no_gradient_there():
    for trained in (0, 1):
        state = of_ones_own()
        for _ in range(trained): train_step(state, torch.ones(4, 3))
        live, state.loss_fn = state.model, lambda model, x: live(x).square().mean() + 0 * model(x).sum()
        before = outside(state)
        with state.fork() as twin:
            with pytest.raises(ValueError, match="has to compute with the model it is given"): twin.run([torch.ones(4, 3)])
        assert outside(state) == before


def test_a_twin_ends_with_its_block():
    with of_ones_own().fork() as twin: pass
    for use in (lambda: twin.run([]), twin.params, lambda: twin.bytes, lambda: twin.model, lambda: twin.fork().__enter__()):
        with pytest.raises(AttributeError, match="it ended with its block"): use()
