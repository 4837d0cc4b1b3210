"A small network learns the function of a fixed random one, by squared error."
from typing import Annotated
import msgspec
from msgspec import Meta
from lal.core.experiment import Experiment, Metric, Milestone, register_experiment

Size = Annotated[int, Meta(ge=1, le=100_000)]


class TeacherKeys(msgspec.Struct, frozen=True, kw_only=True):
    "Its section of a configuration."

    inputs: Annotated[Size, Meta(description="dimension of the inputs")] = 3
    width: Annotated[Size, Meta(description="hidden width of teacher and student")] = 8
    examples: Annotated[Size, Meta(description="examples to train on, and as many to test on")] = 40
    dropout: Annotated[float, Meta(ge=0, lt=1, description="of the student's hidden units")] = 0.0


@register_experiment
class TeacherStudent(Experiment):
    "Teacher-student regression."

    name, keys, headline, higher = "teacher_student", TeacherKeys, "test_loss", False
    columns = (
        Metric("train_loss", r"\frac1N \sum_i (f(x_i) - f^*(x_i))^2", (0, None), "mean squared error over the training inputs"),
        Metric("test_loss", r"\frac1N \sum_i (f(x_i) - f^*(x_i))^2", (0, None), "the same over inputs not trained on"),
        Metric("mean_output", r"\frac1N \sum_i f(x_i)", (None, None), "mean of the student's outputs over the test inputs"),
    )  # fmt: skip
    milestones = (Milestone("converged", "test_loss", 0.01, in_a_row=2, below=True),)

    def build(self, config, device):
        import torch
        from torch import nn
        from lal.core.device import generator, seeded
        from lal.core.state import Batches, TrainState

        def network(stream, dropout=0.0):
            with seeded(config.seed, stream):
                return nn.Sequential(nn.Linear(config.inputs, config.width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(config.width, 1))

        x = torch.randn(2 * config.examples, config.inputs, generator=generator(config.seed, "inputs"))
        with torch.no_grad():
            data = {"x": x.to(device), "y": network("teacher")(x).to(device)}
        train, test = ({k: t[part] for k, t in data.items()} for part in (slice(config.examples), slice(config.examples, None)))
        batches = Batches.shuffled(train, config.batch_size, config.seed)
        return TrainState.create(config, self, network("init", config.dropout), batches, test)

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    def measure(self, state):
        errors = (self.loss(state.model, part) for part in (state.batches.data, state.held_out))
        return dict(zip(("train_loss", "test_loss"), errors)) | {"mean_output": state.model(state.held_out["x"]).mean()}

    def describe(self, config):
        return f"teacher and student, {config.inputs} inputs, width {config.width}"
