"Callbacks for Lightning and transformers: training and logging as without them, rows right, stopped and continued, errors in one sentence."
import logging
import subprocess
import sys
import warnings

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torchmetrics
import transformers
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lal.analysis.runs import load_run
from lal.core.errors import ConfigError
from lal.curvature.params import norm
from lal.hooks import lightning as on_lightning
from lal.hooks import transformers as on_transformers
from lal.hooks.hook import Hook, Metric
from lal.hooks.loop import LoopError

ALL = {"full": {}, "hessian": {"every_n_steps": 40, "burst_length": 11, "check_every": 3}}
STOP = 125  # inside a burst, and in the middle of an epoch


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        yield


def same(one, other, where="") -> None:
    "Assert that two nests of tensors and values are equal, bit for bit."
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one: same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for k, pair in enumerate(zip(one, other)): same(*pair, f"{where}[{k}]")
    else:
        assert one == other, where


def ended(trainer) -> dict:
    "What training has changed."
    optimizer, = trainer.optimizers if hasattr(trainer, "optimizers") else [trainer.optimizer]
    return {"model": trainer.model.state_dict(), "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}


def same_rows(one, other, columns=slice(None)) -> None:
    assert one.hooks == other.hooks
    for name in one.hooks: pd.testing.assert_frame_equal(one.hook(name), other.hook(name), check_exact=True)
    pd.testing.assert_frame_equal(one.history.loc[:, columns], other.history.loc[:, columns], check_exact=True)


class Replayed(Hook):
    "Is the gradient of the loss, evaluated again, the one that the loop computed?"

    kind = "debug"
    metrics = (Metric("error", "", (0, None), "relative"),)

    def pre_step(self, state):
        self.before = state.params()

    def post_step(self, state):
        used, again = state.unclipped(), state.grad_at(self.before, state.batch)
        return {"error": norm({name: used[name] - again[name] for name in used}) / norm(again)}


# transformers

def gpt2(dropout=0.1) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=10, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                                      resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))


def tokens(n=88, length=10) -> list[dict]:
    t = torch.randint(31, (n, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": torch.where(row < 3, -100, row)} for row in t]


def trainer_of(folder, model, callbacks=(), cls=Trainer, data=None, **options) -> Trainer:
    common = dict(max_steps=200, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-3, max_grad_norm=1.0, optim="adamw_torch",
                  lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    names = ("compute_loss_func", "eval_dataset")
    more = {name: options.pop(name) for name in names if name in options}
    trainer = cls(model, TrainingArguments(str(folder), **common | options), train_dataset=data or tokens(), callbacks=[*callbacks], **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == STOP + 3: raise KeyboardInterrupt("killed")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> dict:
    "GPT-2 trained alone, watched, and watched in two parts; with evaluations."
    root, found = tmp_path_factory.mktemp("gpt"), {}
    for name in ("alone", "watched", "parts"):
        watching = [] if name == "alone" else [on_transformers.WatchCallback(ALL, root=root, name=name)]
        options = dict(eval_strategy="steps", eval_steps=50, eval_dataset=tokens(8))
        if name == "parts": options |= dict(save_strategy="steps", save_steps=STOP)
        torch.manual_seed(0)
        trainer = trainer_of(root / f"of_{name}", gpt2(), [*watching, *([Killed()] if name == "parts" else [])], **options)
        if name == "parts":
            with pytest.raises(KeyboardInterrupt): trainer.train()
            found["interrupted"] = load_run("parts", root).summary["status"]
            watching = [on_transformers.WatchCallback(ALL, root=root, name=name)]
            trainer = trainer_of(root / f"of_{name}", gpt2(), watching, **options)
        trainer.train(resume_from_checkpoint=name == "parts")
        found[name] = ended(trainer), trainer, *([load_run(name, root)] if watching else [])
    return found


def test_training_of_gpt2_is_what_it_is_without_the_callback(gpt):
    "Weights, optimizer state and generator after 200 steps with dropout, clipping, accumulation and evaluations, with every hook; and the log."
    same(gpt["alone"][0], gpt["watched"][0])
    logs = [[{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in gpt[k][1].state.log_history] for k in ("alone", "watched")]
    same(*logs)


def test_transformers_stopped_inside_an_epoch_and_a_burst_goes_on(gpt):
    "Rows and weights equal those of the run that went through."
    assert gpt["interrupted"] == "interrupted" and {gpt[k][2].summary["status"] for k in ("watched", "parts")} == {"finished"}
    same(gpt["watched"][0], gpt["parts"][0])
    same_rows(gpt["watched"][2], gpt["parts"][2])
    rows = gpt["watched"][2].hook("hessian")
    assert [*rows.step] == [s for b in (40, 80, 120, 160) for s in range(b + 1, b + 11)]
    assert [*gpt["watched"][2].hook("norms").step] == [11 * k for k in range(1, 19)]
    assert gpt["watched"][2].history.eval_loss.notna().sum() == 4


def test_norm_and_clipping_are_those_of_the_trainer(gpt):
    "The observed gradient over the clip factor is the norm that the Trainer logged."
    _, trainer, run = gpt["watched"]
    logged = {row["step"]: row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row}
    rows = run.hook("hessian")
    n = sum(p.numel() for p in trainer.model.parameters())
    error = rows.observed_grad_norm / rows.clip_factor / rows.step.map(logged) - 1
    assert error.abs().max() < 4 * n**0.5 * 2**-24
    assert rows.observed_grad_norm.max() < 1 + 1e-5


class Recording(Trainer):
    "Keeps weights and batches of each step."
    steps: list

    def training_step(self, model, inputs, num_items_in_batch=None):
        if len(self.steps) <= self.state.global_step:
            self.steps.append(({n: p.detach().clone() for n, p in model.named_parameters()}, []))
        self.steps[-1][1].append(inputs["input_ids"])
        return super().training_step(model, inputs, num_items_in_batch)


def mean_over_targets(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_hessian_on_gpt2_is_the_product_of_autograd_in_float64(tmp_path):
    "Entanglement, content and observed gradient of a model in float64, against autograd on the weights and batches that the loop used."
    torch.manual_seed(0)
    watching = on_transformers.WatchCallback({"hessian": {"every_n_steps": 10, "burst_length": 4, "scheme": "exact"}})
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in tokens()]
    trainer = trainer_of(tmp_path, gpt2(0.0).double(), [watching], Recording, data, max_steps=24, max_grad_norm=0.5, compute_loss_func=mean_over_targets)
    trainer.steps = []
    trainer.train()
    model = trainer.model

    def loss(params, batch):
        logits = functional_call(model, params, (batch,)).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum") / batch.numel()

    def derivatives(params, batches, v=None):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        value = loss(leaves, torch.cat(batches))
        g = torch.autograd.grad(value, [*leaves.values()], create_graph=v is not None)
        return g if v is None else torch.autograd.grad(g, [*leaves.values()], v)

    length = lambda tensors: float(sum(t.square().sum() for t in tensors).sqrt())
    rows = watching.table("hessian")
    assert [*rows.step] == [11, 12, 13, 21, 22, 23]
    for row in rows.itertuples():
        (theta, batches_a), (here, batches_b) = trainer.steps[row.step - 2 : row.step]
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
            bent = derivatives(theta, batches_b, derivatives(theta, batches_a))
        assert row.entanglement_norm == pytest.approx(length(bent), rel=1e-9)
        assert row.content_norm == pytest.approx(length(derivatives(theta, batches_b)), rel=1e-9)
        assert row.observed_grad_norm == pytest.approx(min(0.5, length(derivatives(here, batches_b))), rel=1e-5)


class Plain(nn.Module):
    "A model that knows nothing of the number of targets."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(31, 8), nn.Dropout(0.2), nn.Linear(8, 31))

    def forward(self, input_ids, labels=None):
        logits = self.net(input_ids)
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


@pytest.mark.parametrize("model, options", [
    (gpt2, {}), (Plain, {}), (Plain, dict(gradient_accumulation_steps=3, max_grad_norm=0.0)), (gpt2, dict(label_smoothing_factor=0.1)),
    (gpt2, dict(bf16=True)), (gpt2, dict(compute_loss_func=mean_over_targets)),
], ids=["sum", "mean", "three", "smoothed", "bf16", "own"])
def test_each_step_of_the_trainer_is_replayed(tmp_path, model, options):
    "The loss that hooks evaluate has the gradient that the loop computed, at every step: dropout, unequal batches, a shorter last step."
    torch.manual_seed(0)
    watching = on_transformers.WatchCallback([Replayed()])
    trainer_of(tmp_path, model(), [watching], data=tokens(21), max_steps=6, **options).train()
    rows = watching.table("replayed")
    assert [*rows.step] == [*range(1, 7)] and rows.error.max() < 1e-5


def test_transformers_gives_the_methods_back_after_an_error(tmp_path):
    "The run is failed, the error is the loop's own, and another training follows."
    class Raises(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3: raise RuntimeError("broken")

    watching = on_transformers.WatchCallback("norms", root=tmp_path, name="broken")
    trainer = trainer_of(tmp_path / "of", Plain(), [watching, Raises()], max_steps=5)
    before = dict(vars(trainer)), dict(vars(trainer.accelerator))
    with pytest.raises(RuntimeError, match="broken"): trainer.train()
    assert load_run("broken", tmp_path).summary["status"] == "failed"
    for was, thing in zip(before, (trainer, trainer.accelerator)):
        assert not {"training_step", "_run_epoch", "clip_grad_norm_"} & (vars(thing).keys() - was.keys())
    trainer.pop_callback(Raises), trainer.pop_callback(watching)
    assert trainer.train().global_step == 5


def test_transformers_resumed_from_elsewhere_begins_anew_with_a_warning(tmp_path):
    "A checkpoint without the callback's file: one sentence, and counts that go on."
    trainer_of(tmp_path, Plain(), max_steps=4, save_strategy="steps", save_steps=4).train()
    watching = on_transformers.WatchCallback({"training_metrics": {"every_n_steps": 1}})
    with pytest.warns(UserWarning, match="there is no lal.pt in checkpoint-4") as caught:
        trainer_of(tmp_path, Plain(), [watching], max_steps=6).train(resume_from_checkpoint=True)
    assert "\n" not in str(caught[0].message)
    assert [*watching.table("training_metrics").step] == [5, 6]


# Lightning

class Net(pl.LightningModule):
    "Dropout, batch normalisation, logging, metrics, and a list that an epoch's end averages."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.losses, self.drawn = [], None

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.losses.append(loss.item())
        self.accuracy(out, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"train_acc": self.accuracy}, on_step=False, on_epoch=True)
        return {"loss": loss}

    def on_train_epoch_end(self):
        self.log("mean_loss", sum(self.losses) / len(self.losses))
        self.losses.clear()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, 200), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["drawn"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint):
        self.drawn = checkpoint["drawn"]

    def on_train_start(self):
        if self.drawn is not None: torch.set_rng_state(self.drawn)


class Loader:
    "Batches in an order of their own each epoch, from any position on."

    def __init__(self, n=90, size=5):
        rng = torch.Generator().manual_seed(0)
        self.x, self.y, self.size, self.epoch, self.position = torch.randn(n, 6, generator=rng), torch.randint(3, (n,), generator=rng), size, 0, 0

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch)).split(self.size)
        for k in range(self.position, len(order)):
            self.epoch, self.position = (self.epoch, k + 1) if k + 1 < len(order) else (self.epoch + 1, 0)
            yield self.x[order[k]], self.y[order[k]]

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, saved):
        self.epoch, self.position = saved["epoch"], saved["position"]


def fit(module, callbacks=(), loader=None, ckpt_path=None, weights_only=None, **options) -> pl.Trainer:
    common = dict(max_steps=200, accumulate_grad_batches=2, gradient_clip_val=0.5, accelerator="cpu", devices=1, logger=False, num_sanity_val_steps=0,
                  enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(**common | options, callbacks=[*callbacks])
    trainer.fit(module, loader or Loader(), DataLoader(TensorDataset(*next(iter(Loader(20, 20)))), 20), ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer


def scaled() -> list:
    return [pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]


class Bare(Net):
    "Returns the loss itself, and takes the batch alone."

    def training_step(self, batch):
        return super().training_step(batch, 0)["loss"]


@pytest.mark.parametrize("module, options", [
    (Net, {}), (Bare, {}), (Net, dict(accumulate_grad_batches=3, gradient_clip_val=None)), (Net, dict(precision="bf16-mixed")), (Net, dict(plugins=scaled)),
    (Net, dict(precision="64-true")),
], ids=["two", "bare", "three", "bf16", "scaled", "double"])
def test_each_step_of_lightning_is_replayed(module, options):
    "The loss that hooks evaluate has the gradient that the loop computed, at every step: dropout, shares of batches, a shorter last step, other precisions."
    torch.manual_seed(0)
    options = {name: value() if callable(value) else value for name, value in options.items()}
    watching = on_lightning.WatchCallback([Replayed()])
    fit(module(), [watching], Loader(33), max_steps=9, **options)
    rows = watching.table("replayed")
    assert [*rows.step] == [*range(1, 10)]
    assert rows.error.max() < (1e-5 if "plugins" not in options else 1e-2)  # a product with a scale in float16 rounds


def test_a_loss_of_ones_own_in_lightning():
    "It is used instead of training_step, and compared with the step's gradient."
    def loss(module, batch): return F.cross_entropy(module.net(batch[0]), batch[1])

    watching = on_lightning.WatchCallback([Replayed()], loss)
    fit(Net(), [watching], max_steps=3)
    assert watching.table("replayed").error.max() < 1e-5
    with pytest.raises(LoopError, match="2 times|0.5 times"):
        fit(Net(), [on_lightning.WatchCallback("norms", lambda *both: 2 * loss(*both))], max_steps=3)


class Traced(Net):
    "PyTorch's compiler stumbles over logging, with or without hooks."

    def training_step(self, batch, batch_idx): return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_epoch_end(self): pass


def test_a_compiled_module_in_lightning():
    "Exact products are taken without the compiler."
    watching = on_lightning.WatchCallback({"hessian": {"every_n_steps": 2, "burst_length": 2, "scheme": "exact"}})
    fit(torch.compile(Traced(), backend="aot_eager"), [watching], max_steps=6)
    assert [*watching.table("hessian").step] == [3, 4, 5, 6]


def test_a_finished_training_in_lightning_goes_on(tmp_path):
    "With the checkpoint written after the end, more epochs continue the tables."
    for epochs in (2, 3):
        watching = on_lightning.WatchCallback("norms", root=tmp_path, name="more")
        trainer = fit(Net(), [watching], max_steps=-1, max_epochs=epochs, ckpt_path=tmp_path / "end.ckpt" if epochs == 3 else None)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    run = load_run("more", tmp_path)
    assert [*run.hook("norms").epoch] == [*run.history.epoch] == [1, 2, 3] and run.summary["status"] == "finished"


def test_a_checkpoint_of_the_last_step_of_an_epoch_in_lightning(tmp_path):
    "Continued from it, the next epoch is another one, and rows and weights are those of the training that went through."
    found = []
    for name in ("whole", "parts"):
        torch.manual_seed(0)
        watching = on_lightning.WatchCallback("norms,consecutive", root=tmp_path, name=name)
        saves = pl.callbacks.ModelCheckpoint(tmp_path / f"of_{name}", "{step}", every_n_train_steps=18, save_top_k=-1)
        common = dict(max_steps=-1, max_epochs=4, enable_checkpointing=True)
        if name == "parts":
            fit(Net(), [watching, saves], **common | {"max_epochs": 3})
            watching = on_lightning.WatchCallback("norms,consecutive", root=tmp_path, name=name)
            common |= {"ckpt_path": tmp_path / "of_parts/step=18.ckpt"}
        found.append(ended(fit(Net(), [watching, saves], **common)))
    same(*found)
    runs = [load_run(name, tmp_path) for name in ("whole", "parts")]
    for run in runs: assert [*run.hook("norms").epoch] == [*run.history.epoch] == [1, 2, 3, 4]
    same_rows(*runs, ["epoch", "step", "loss", "lr", "total_weight_norm"])  # Lightning leaves out the metrics of this epoch


def test_an_interrupt_in_lightning(tmp_path):
    "The run is interrupted; Lightning's own way out is as it was."
    class Interrupts(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3: raise KeyboardInterrupt

    with pytest.raises(SystemExit): fit(Net(), [on_lightning.WatchCallback("norms", root=tmp_path, name="cut"), Interrupts()])
    assert load_run("cut", tmp_path).summary["status"] == "interrupted"


class Manual(Net):
    automatic_optimization = False


class Twice(Net):
    def configure_optimizers(self): return torch.optim.LBFGS(self.parameters())


class Clips(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.1, "norm")


class Fetches(Net):
    def training_step(self, dataloader_iter): return super().training_step(next(dataloader_iter)[0], 0)


class Silent(Net):
    def training_step(self, batch, batch_idx): return None


@pytest.mark.parametrize("module, options, words", [
    (Manual, dict(gradient_clip_val=None, accumulate_grad_batches=1), "manual optimization"), (Twice, dict(gradient_clip_val=None), "LBFGS"),
    (Clips, {}, "configure_gradient_clipping"), (Fetches, {}, "dataloader_iter"), (Net, dict(gradient_clip_algorithm="value"), "clipped by value"),
    (Net, dict(strategy="ddp"), "DDPStrategy"),
])
def test_what_lightning_cannot_be_watched_doing(module, options, words):
    "One sentence each, before the first step."
    with pytest.raises(ConfigError, match=words) as caught: fit(module(), [on_lightning.WatchCallback()], **options)
    assert "\n" not in str(caught.value)
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()


@pytest.mark.parametrize("module, extra", [("lightning", "lightning"), ("transformers", "transformers")])
def test_a_missing_library_names_the_extra(module, extra):
    "One line; and the registry imports neither."
    gone = "import sys\nfor name in ('lightning', 'pytorch_lightning', 'transformers'): sys.modules[name] = None\nimport lal.hooks.registry\n"
    done = subprocess.run([sys.executable, "-c", f"{gone}import lal.hooks.{module}"], capture_output=True, text=True)
    assert done.returncode and done.stderr.splitlines()[-1].endswith(f"pip install 'lal[{extra}]'")


@pytest.mark.parametrize("callback", [on_lightning.WatchCallback, on_transformers.WatchCallback])
def test_an_option_that_watch_has_not_is_refused_at_once(callback):
    "And a table before training is one sentence."
    with pytest.raises(TypeError, match="log_evry"): callback(log_evry=3)
    with pytest.raises(ConfigError, match="training has not begun"): callback().table("norms")


class Parts(pl.Callback):
    "Save inside an epoch and a burst, and break off some batches later."

    def __init__(self, file): self.file = file

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == STOP and not self.file.exists(): trainer.save_checkpoint(self.file)
        if trainer.global_step == STOP + 3: raise RuntimeError("killed")


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> dict:
    "The module trained alone, watched, and watched in two parts."
    root, found = tmp_path_factory.mktemp("net"), {}
    for name in ("alone", "watched", "parts"):
        watching = [] if name == "alone" else [on_lightning.WatchCallback(ALL, root=root, name=name)]
        torch.manual_seed(0)
        if name == "parts":
            with pytest.raises(RuntimeError, match="killed"): fit(Net(), [*watching, Parts(root / "part.ckpt")])
            found["failed"] = load_run("parts", root).summary["status"]
            watching = [on_lightning.WatchCallback(ALL, root=root, name=name)]
        trainer = fit(Net(), watching, ckpt_path=root / "part.ckpt" if name == "parts" else None, weights_only=name == "parts" or None)
        found[name] = ended(trainer), trainer, *([load_run(name, root)] if watching else [])
    return found


def test_training_in_lightning_is_what_it_is_without_the_callback(net):
    "Weights, buffers, optimizer state and generator after 200 steps with dropout, clipping, accumulation and validation; and all that was logged."
    same(net["alone"][0], net["watched"][0])
    for what in ("callback_metrics", "logged_metrics"): same(*[dict(getattr(net[k][1], what)) for k in ("alone", "watched")])
    assert {"train_loss_epoch", "train_acc", "mean_loss", "val_loss"} <= net["watched"][1].callback_metrics.keys()


def test_lightning_stopped_inside_an_epoch_and_a_burst_goes_on(net):
    "Rows and weights equal those of the run that went through, from a checkpoint read with weights_only."
    assert net["failed"] == "failed" and {net[k][2].summary["status"] for k in ("watched", "parts")} == {"finished"}
    same(net["watched"][0], net["parts"][0])
    rows = [net[k][2].hook("hessian") for k in ("watched", "parts")]
    assert [*rows[0].step] == [s for b in (40, 80, 120, 160) for s in range(b + 1, b + 11)]
    columns = ["epoch", "step", "loss", "lr", "total_weight_norm", "val_loss"]  # averages over an epoch are Lightning's, which begins them again
    same_rows(net["watched"][2], net["parts"][2], columns)
    assert [*net["watched"][2].hook("norms").step] == [9 * k for k in range(1, 23)]
    assert net["watched"][2].history.val_loss.notna().all()
