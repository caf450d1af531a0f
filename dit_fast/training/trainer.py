"""`Trainer`: a run's model, optimizer and step, built from a configuration, saved, and restored bit for bit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast import __version__
from dit_fast.checkpoint.folder import Retention, checkpoint_bytes, load_into, model_config
from dit_fast.checkpoint.manifest import working_directory
from dit_fast.checkpoint.power_ema import SNAPSHOTS, PowerAverages
from dit_fast.checkpoint.tensors import fill
from dit_fast.checkpoint.weight_file import TrainingState
from dit_fast.checkpoint.writer import CheckpointWriter
from dit_fast.data import ImageSet, LatentSet, open_stream
from dit_fast.diffusion import create_objective
from dit_fast.diffusion.timestep_sampler import TimestepSampling
from dit_fast.distributed.agreement import Agreed, Agreement
from dit_fast.distributed.sharding import (
    choose_parallel,
    groups_of,
    mark_communication,
    parallelize,
    rank_rows,
)
from dit_fast.distributed.signals import StopRequest
from dit_fast.distributed.world import START_TIMEOUT, World, choose_device
from dit_fast.errors import CheckpointError, ConfigError, NonFiniteError
from dit_fast.interop.adapter import BASE
from dit_fast.model.dit import DiT
from dit_fast.model.folder import write_model
from dit_fast.training.config import TrainConfig, build_model
from dit_fast.training.graphs import CudaGraphs, GraphedStep, can_compile, compile_step
from dit_fast.training.initial import InitialWeights, freeze
from dit_fast.training.lora import Adapters, Base, attach
from dit_fast.training.optimizer import AdamWEma, learning_rate, make_optimizer
from dit_fast.training.precision import (
    AUTOCAST,
    LossScale,
    choose_precision,
    keep_residual_in_bf16,
    on_copies,
    use_float8,
)
from dit_fast.training.step import BUCKETS, LEVELS, StepOptions, StepState, StepValues, TrainStep
from dit_fast.utils.files import require_space
from dit_fast.utils.nvtx import OFF, Ranges, mark_blocks, nvtx_ranges

MOST_REMEMBERED = 1000
"""Upper bound on the steps whose values stay on the device; with longer log intervals they are read in between."""


class Trainer:
    """Model, optimizer with averaged weights, objective and stream of a run, and its step.

    The model is trained in eval mode: label dropout is the only difference of a DiT's training mode, and the step draws
    it itself, keyed by the sample.

    Args:
        config: Configuration of the run.
        data: Its data set.
        ranges: NVTX ranges; None: as `config.nvtx` selects.
        world: The ranks, each of which takes its rows of every batch; None: one process.
        initial: Weights to start from, the same on all ranks; None: drawn with the seed.

    Attributes:
        origin: Where the initial weights came from, as the manifest records it; None where they were drawn.
        partly: What is trained where that is not everything, in words, for the user.
        adapters: Of a run with --lora, else None.
        step: Number of finished steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageSet | LatentSet,
        ranges: Ranges | None = None,
        world: World | None = None,
        initial: InitialWeights | Base | None = None,
    ):
        self.world = world or World(device=choose_device(config.device))
        self.device = self.world.device
        # A run keeps the precision that "auto" chose, also where it is resumed on other hardware.
        config = dataclasses.replace(config, precision=choose_precision(config.precision, self.device))
        self.config = config
        self.data = data
        self.ranges = ranges or (nvtx_ranges() if config.nvtx else OFF)
        with torch.random.fork_rng(devices=[]):
            # The weights depend on the seed alone, and the caller's generator stays as it was.
            torch.manual_seed(config.seed)
            self.model = build_model(config, data).eval()
        self.origin: dict[str, Any] | None = None
        if initial is not None:
            initial.fit(self.model)
            self.origin = initial.record()
        frozen = freeze(self.model, config.freeze)
        self.partly = [] if frozen is None else [frozen]
        self.adapters: Adapters | None = None
        if config.lora is not None:
            assert initial is not None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.adapters = attach(self.model, config, initial, keep=self.world.is_first)
            self.partly.append(self.adapters.line)
        self.parallel = choose_parallel(config.parallel, self.world)
        if self.parallel in ("fsdp", "hsdp") and config.optimizer != "adamw_ema":
            raise ConfigError(
                f"--optimizer {config.optimizer} does not go with --parallel {self.parallel}: give ours"
            )
        self.rows = rank_rows(config.batch_size, config.accumulate, self.world)
        self.compiles = config.compile and can_compile(self.device)
        # Low-precision copies need one process and one micro-batch: FSDP casts each shard when it gathers it, and sums
        # over micro-batches and ranks are in float32.
        copies = (
            config.precision == "bf16"
            and config.optimizer == "adamw_ema"
            and self.parallel == "none"
            and config.accumulate == 1
        )
        if not copies:
            self.denoiser = self._prepare(self.model)
        self.trained = {
            name: p for name, p in self.model.to(self.device).named_parameters() if p.requires_grad
        }
        rate_dtype = torch.float64 if config.optimizer == "adamw_ema" else torch.float32
        self.state = StepState(self.device, min(config.log_every, MOST_REMEMBERED), rate_dtype)
        self.optimizer = make_optimizer(
            config.optimizer,
            self.trained.values(),
            lr=self.state.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
            max_grad_norm=config.max_grad_norm,
            kernels=config.kernels,
            **({"low_precision_copy": torch.bfloat16} if copies else {}),
        )
        if copies:
            self.denoiser = self._prepare(on_copies(self.model, cast(AdamWEma, self.optimizer)))
        self.averages = PowerAverages(self.trained) if config.ema_snapshot_every else None
        self.objective = create_objective(**config.objective_arguments())
        self.timestep_sampling = TimestepSampling(
            self.objective, config.seed, config.timestep_sampling, self.device
        )
        self.stream = open_stream(data, config.batch_size, config.seed, config.flip)
        self.total_steps = config.total_steps(len(data.train))
        self.step = 0
        self.seconds = 0.0
        # On CUDA, reading a value waits for the device; there `check_finite` is called when a log line is due.
        self.checks_every_step = self.device.type == "cpu"
        self.loss_scale = LossScale(self.device) if config.precision == "fp16" else None
        self.agreement = Agreement(self.world, StopRequest(alone=self.world.size == 1))
        self.work = TrainStep(
            self.denoiser,
            self.optimizer,
            self.objective,
            StepOptions(
                seed=config.seed,
                batch_size=config.batch_size,
                num_classes=data.num_classes,
                class_dropout_prob=config.class_dropout_prob,
                accumulate=config.accumulate,
                skip_nonfinite=config.skip_nonfinite,
                autocast=AUTOCAST.get(config.precision),
            ),
            self.state,
            torch.arange(config.batch_size, device=self.device)[self.rows],
            agreement=self.agreement,
            timesteps=self.timestep_sampling,
            posterior=data.posterior if isinstance(data, LatentSet) else None,
            loss_scale=self.loss_scale,
            ranges=self.ranges,
        )
        if self.compiles:
            compile_step(self.work)
        self.run_step: Callable[[Tensor, Tensor], None] = self.work
        if config.cuda_graph and self.world.size > 1:
            raise ConfigError("--cuda-graph does not support more than one rank; remove it")
        if config.cuda_graph:
            if self.device.type != "cuda":
                raise ConfigError(f"--cuda-graph needs a CUDA device, this is {self.device.type}; remove it")
            self.run_step = GraphedStep(self.work, CudaGraphs())
        self._patience = START_TIMEOUT
        self._rate: float | None = None
        self._read = 0
        if initial is not None and initial.past is not None:
            self._continue(initial.past)

    def _prepare(self, model: DiT) -> nn.Module:
        """Apply precision, ranges, compilation and sharding, in the required order; returns the module to call."""
        config = self.config
        if config.precision == "fp8":
            use_float8(model, self.device)
        if config.residual == "bf16":
            keep_residual_in_bf16(model)
        if self.ranges is not OFF:
            mark_blocks(model.blocks, self.ranges)
        module = parallelize(
            model,
            self.world,
            self.parallel,
            compile=self.compiles,
            param_dtype=AUTOCAST.get(config.precision),
        )
        if self.ranges is not OFF:
            mark_communication(module, self.ranges)
        return module

    def train_step(
        self, samples: Tensor, labels: Tensor, *, save_failed: bool = False, data_ends: bool = False
    ) -> Agreed:
        """One optimizer and EMA step on the batch that `stream.stored` returns for `step`.

        Args:
            samples: Images or latents (b, C, H, W), or moments (b, K, C, H, W).
            labels: Labels (b,) or captions (b, S, E).
            save_failed: Whether this rank's last checkpoint could not be written.
            data_ends: Whether this rank cannot read the batch after the next one.

        Returns:
            What any rank reported in this step: a stop request, a failed save, the end of its data.

        Raises:
            NonFiniteError: The loss or gradient norm is NaN or infinite; parameters and optimizer are as before the
                step. Raised at once on the CPU, by the next `check_finite` on CUDA.
        """
        rate = self.learning_rate()
        if rate != self._rate:
            # A tensor, so that a captured graph reads the new value.
            self._rate = rate
            self.state.lr.fill_(rate)
        self.agreement.report(save_failed, data_ends)
        self.run_step(samples.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
        agreed = self.agreement.read(self._patience)
        if self.checks_every_step:
            self.check_finite()
        self.step += 1
        if self.averages is not None:
            self.averages.update(self.step)
        if self._patience != self.config.timeout:
            # The first step may compile; from now on, a rank that takes longer counts as lost.
            self._patience = self.config.timeout
            self.world.set_timeout(self.config.timeout, groups_of(self.denoiser))
        return agreed

    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        config = self.config
        return learning_rate(
            self.step,
            lr=config.lr,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            total_steps=self.total_steps,
        )

    def check_finite(self) -> None:
        """Raise NonFiniteError if a step so far had a loss or gradient norm that is NaN or infinite."""
        failed = int(self.state.failed)
        if failed < 0:
            return
        rank = self.agreement.bad_rank
        ids = self.sample_ids(failed)
        if rank is not None:
            rows = len(ids) // self.world.size
            ids = ids[rank * rows : (rank + 1) * rows]
        samples = ", ".join(map(str, ids[:8]))
        more = f", {len(ids) - 8} more" if len(ids) > 8 else ""
        cap = self.config.skip_nonfinite
        raise NonFiniteError(
            f"step {failed}{'' if rank is None else f', rank {rank}'}: the loss or the gradient norm is not finite"
            + (f", after {cap} such steps were skipped" if cap else "")
            + f"; the update was not made (training samples {samples}{more}). "
            f"Start anew with a lower --lr or with --precision fp32; the last checkpoint is whole"
        )

    def sample_ids(self, step: int) -> list[int]:
        """Positions in the data set of the samples of step number `step`, counted from 1."""
        indices = self.stream.indices(step - 1)
        return self.stream.split.members[indices].tolist()

    def drawn(self, step: int) -> dict[str, list[float]]:
        """`timesteps` of the samples of step number `step`, counted from 1, and the `weights` of their losses where
        these are not 1.

        Of importance sampling, whose draws follow from losses that are forgotten, the step must be one that
        `values` may still give, and every rank must call it.
        """
        kept = self.work.drawn
        if kept is None:
            return {"timesteps": self.timestep_sampling.draw(self.stream.numbers(step - 1))[0].tolist()}
        ranks = self.world.gather(kept[(step - 1) % len(kept)].tolist())
        timesteps, weights = ([value for rank in ranks for value in rank[row]] for row in (0, 1))
        return {"timesteps": timesteps, "weights": weights}

    def values(self) -> list[StepValues]:
        """Values of the steps since the last call, as far as the history reaches; waits for the device.

        They are those of all ranks together, and every rank must call it.
        """
        size = len(self.state.history)
        history = self.world.mean(self.state.history.clone())
        # Losses are means, those by timestep are sums and counts.
        history[:, -2 * (BUCKETS + LEVELS) :] *= self.world.size
        rows = history.tolist()
        first, self._read = max(self._read, self.step - size), self.step
        return [StepValues.of_row(rows[step % size]) for step in range(first, self.step)]

    def manifest(self, log: dict[str, Any] | None = None) -> dict[str, Any]:
        """Contents of a checkpoint's manifest, besides its files. log: state of the run's log (`Watch.state`)."""
        return {
            "dit_fast_version": __version__,
            "torch_version": torch.__version__,
            "step": self.step,
            "ranks": self.world.size,
            "parallel": self.parallel,
            "samples_seen": self.step * self.config.batch_size,
            "seconds": round(self.seconds, 3),
            "seed": self.config.seed,
            "train_config": dataclasses.asdict(self.config),
            "working_directory": working_directory(),
            "data": self.data.describe(),
            "class_names": list(self.data.class_names) if self.model.num_classes else [],
            "diffusion": self.config.objective_arguments(),
            "ema_decay": self.config.ema_decay,
            "power_averages": None if self.averages is None else self.averages.describe(),
            "updates": self._updates(),
            "skipped": int(self.state.skipped),
            **self._unreadable(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state(),
            "log": log,
            "init_from": self.origin,
            "adapter": None if self.adapters is None else self.adapters.about(),
        }

    def _unreadable(self) -> dict[str, Any]:
        """Files that a rank could not read, and the data's fingerprint without them; {} where all could be read."""
        register, without = self.data.unreadable, self.data.without
        for known in self.world.gather(dict(register.known)):
            register.merge(known)
        names = dict(sorted(register.known.items()))
        if not names:
            return {}
        rest = {} if without is None else {"fingerprint_without": without(names)}
        return {"unreadable": {"files": names, **rest}}

    def _updates(self) -> int:
        """Number of updates that the optimizer applied: `step` less the skipped ones."""
        held = [self.optimizer.state.get(p, {}).get("step") for p in self.trained.values()]
        return max((int(step) for step in held if step is not None), default=0)

    def stored_state(self) -> dict[str, Tensor]:
        """The state dict as checkpoints hold it: of a run with --lora only what is trained, the rest is in RUN/base."""
        state = self.model.state_dict()
        return state if self.adapters is None else {name: state[name] for name in self.trained}

    def ema_state(self, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The averaged tensors of `state`, with the model's names; None: of its whole state dict. Live, not copies."""
        return {
            name: self.optimizer.average(self.trained[name]) if name in self.trained else tensor.detach()
            for name, tensor in (self.model.state_dict() if state is None else state).items()
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments by parameter name; before the first step they are zeros."""
        state = {}
        for name, parameter in self.trained.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                held = self.optimizer.state.get(parameter, {}).get(moment)
                state[f"{moment}.{name}"] = torch.zeros_like(parameter) if held is None else held
        return state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint by file, then name; live, and sharded as the model is."""
        state = self.stored_state()
        return {
            "model": state,
            "ema": self.ema_state(state),
            "optimizer": {**self.optimizer_state(), **self.timestep_sampling.state},
            **self.snapshot(),
        }

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Power-function averages, if any, by file, then name; live."""
        return {} if self.averages is None else self.averages.state(self.stored_state())

    def save(self, writer: CheckpointWriter, log: dict[str, Any] | None = None) -> None:
        """Start writing a checkpoint of the current state; raises instead if a step has failed."""
        self.check_finite()
        with self.ranges("checkpoint"):
            writer.save(model_config(self.model), self.tensors(), self.manifest(log))

    def save_base(self, run: Path) -> None:
        """With --lora, write the weights that the run began with to RUN/base; a saved model as any other."""
        if self.adapters is None or self.adapters.base is None:
            return
        base, self.adapters.base = self.adapters.base, None
        require_space(run, checkpoint_bytes(base))
        write_model(base, model_config(self.model), run / BASE)

    def save_snapshot(self, writer: CheckpointWriter) -> None:
        """The same for a snapshot of the power-function averages, which retention never deletes."""
        self.check_finite()
        with self.ranges("checkpoint"):
            writer.save(
                model_config(self.model), self.snapshot(), self.manifest(), snapshots=writer.run / SNAPSHOTS
            )

    def writer(self, run: Path) -> CheckpointWriter:
        """A writer of this run's checkpoints."""
        config = self.config
        retention = Retention(config.keep_checkpoints, config.milestone_every)
        return CheckpointWriter(run, retention, self.world, config.async_checkpoint)

    def restore(self, path: Path, manifest: dict[str, Any]) -> None:
        """Load the state of a verified checkpoint in place, whatever number of ranks wrote it.

        Raises CheckpointError if it was trained on other data, or holds another model.
        """
        present = self.data.describe()
        unreadable = manifest.get("unreadable") or {}
        files, rest = unreadable.get("files", {}), unreadable.get("fingerprint_without")
        if rest is not None and self.data.without is not None and rest == self.data.without(files):
            # Files that could not be read may have been repaired or replaced since.
            present["fingerprint"] = manifest["data"].get("fingerprint")
        self.data.unreadable.resume_from(files)
        changed = [
            f"{key} is {manifest['data'].get(key)} there and {value} here"
            for key, value in present.items()
            # A fact that the run's manifest predates has no value to compare with.
            if key != "name" and manifest["data"].get(key, value) != value
        ]
        if changed:
            raise CheckpointError(f"{path} was trained on other data: {'; '.join(changed)}")
        self.step = self._read = int(manifest["step"])
        self.state.step.fill_(self.step)
        self.state.skipped.fill_(manifest.get("skipped", 0))
        self.seconds = float(manifest["seconds"])
        self.origin = manifest.get("init_from")
        if self.averages is not None:
            self.averages.step = int(manifest["power_averages"]["step"])
        if self.loss_scale is not None and manifest.get("loss_scale"):
            self.loss_scale.restore(manifest["loss_scale"])
        self._begin_optimizer(float(manifest.get("updates", self.step)))
        load_into(path, manifest, self.tensors())
        if isinstance(self.optimizer, AdamWEma):
            self.optimizer.refresh_copies()

    def _begin_optimizer(self, updates: float) -> None:
        """State of the optimizer after this many updates, with moments of zeros, to be filled."""
        for parameter in self.trained.values():
            moments = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                "step": torch.tensor(updates, device=self.device),
                **moments,
                "ema": parameter.detach().clone(),
            }

    def _continue(self, past: TrainingState) -> None:
        """Take EMA, moments and step of another training of the same weights."""
        if past.step >= self.total_steps:
            raise ConfigError(
                f"--steps {self.total_steps}: {self.config.init_from} has {past.step} steps already; give more"
            )
        self.step = self._read = past.step
        self.state.step.fill_(past.step)
        self._begin_optimizer(float(past.step))
        for name, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            fill(state["ema"], past.ema[name])
            for moment, tensors in past.moments.items():
                fill(state[moment], tensors[name])
