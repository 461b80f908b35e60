"""The trainings under way on this device: their steps take turns with those of pictures, in pieces
that nobody waits long behind."""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_service import messages
from dit_service.engine.device import peak_bytes
from dit_service.engine.diary import Diary, part
from dit_service.engine.lines import Load
from dit_service.engine.pace import Announce, Pace
from dit_service.model.adapter_loading import load_adapter
from dit_service.model.adapters import Use, Uses
from dit_service.model.attention.backends import BACKENDS
from dit_service.model.narrow import MULTIPLIED
from dit_service.model.transformer import ZImageTransformer
from dit_service.training.rehearsal import Rehearsal
from dit_service.training.training import LEVELS, Example, Training, alone
from zimage_core.errors import InvalidRequest, NotReady, Unavailable, ZImageError
from zimage_core.formats import eight_bits
from zimage_core.planning.flops import dit_step_flops
from zimage_core.planning.limits import padded
from zimage_core.planning.memory import FULL, weight_bytes
from zimage_core.planning.training import TrainingPlan
from zimage_core.planning.training_memory import (
    Base,
    Rows,
    TrainingBytes,
    best_batch,
    careful,
    fitting,
    forwards,
    largest,
    learnt_count,
    training_bytes,
)
from zimage_core.serving.child import is_sticky

_log = logging.getLogger(__name__)

_SLOWEST_SECONDS_PER_FLOP = 1e-9
_LEARNT_FROM = ("latents", "mask", eight_bits.TENSOR, eight_bits.SCALE)
_PART_BYTES = 4 << 30
"""Of a state, in a file of its own."""
_LOOK_SECONDS = 0.02
_INSTEAD = "; fewer samples_at_once, or recompute blocks or offloaded"
_OPENING_SECONDS, _SLOWEST_BYTES_PER_SECOND = 60.0, 5e7
"""What the watchdog is told of a training that begins: its state comes from disks."""
_COMPILING_SECONDS = 600.0
_TAKEN_SECONDS = 30.0
"""Until the next try, while another learns the model."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a training wants of the device next."""

    load: Load
    flops_left: float
    """Of this and all that is left of its step."""


class Company(Protocol):
    """Other devices that train together with this one."""

    is_busy: bool
    """Whether they are at a step: another training's waits for it."""
    device_count: int
    """With this one."""

    def part(self, count: int) -> range:
        """Which samples of a batch are computed here."""

    def largest_part(self, count: int) -> int:
        """How many of a batch one of them computes at most."""

    def follow(self, asked: messages.OpenTraining | messages.CloseTraining) -> None:
        """They do the same; raises what went wrong with one."""

    def begin(self, asked: messages.Learn) -> None:
        """They compute their parts of a step."""

    def shared(self, loss: float, weights: Sequence[Tensor]) -> float:
        """The loss of all parts; gradients are those of all parts afterwards."""

    def give_up(self) -> None:
        """The step at hand is not taken."""


class Alone:
    """There are none."""

    is_busy, device_count = False, 1

    def part(self, count: int) -> range:
        """All."""
        return range(count)

    def largest_part(self, count: int) -> int:
        """All."""
        return count

    def follow(self, asked: messages.OpenTraining | messages.CloseTraining) -> None:
        """Nobody does."""

    def begin(self, asked: messages.Learn) -> None:
        """Nobody computes."""

    def shared(self, loss: float, weights: Sequence[Tensor]) -> float:
        """What there is."""
        return alone(loss, weights)

    def give_up(self) -> None:
        """Nobody waits."""


@dataclass(frozen=True, slots=True)
class Means:
    """What trainings have beside a model."""

    room_bytes: float = math.inf
    """Of the device, for all of them together."""
    usual_bytes: float = math.inf
    """What they may take of that where nobody says how to compute."""
    restore: Callable[[], None] | None = None
    """Makes the model what it was; where there is that, it is learnt itself, by one at a time."""
    company: Company = field(default_factory=Alone)
    kept_bytes: int = 4 << 30
    """Of samples in host memory."""


class Free:
    """Waits until no step is under way with others."""

    def __init__(self, company: Company) -> None:
        self._company = company

    @property
    def is_there(self) -> bool:
        """Whether they hear something else now."""
        return not self._company.is_busy

    def wait(self) -> None:
        """A step comes to its end while others work."""


class Turn:
    """Waits for the step before, for what is being written of it, and for who computes with it."""

    def __init__(self, course: "_Course", step: int, company: Company) -> None:
        self._course = course
        self._step = step
        self._company = company

    @property
    def is_there(self) -> bool:
        """Whether it is behind this training, or never will be."""
        course = self._course
        is_behind = course.training.step >= self._step and course.is_written.is_set()
        return course.is_broken or (is_behind and not self._company.is_busy)

    def wait(self) -> None:
        """Steps come while others work; files take their time."""
        self._course.is_written.wait(_LOOK_SECONDS)


_Thought = messages.OpenTraining | messages.PlanTraining
Learning = Generator[Lesson | Turn | Free, object, None]
"""A step of a training under way: has its turn whenever it is gone on with."""


class Trainings:
    """One model's, by the sessions that they belong to."""

    def __init__(
        self,
        model: ZImageTransformer,
        backend: str,
        announce: Announce,
        diary: Diary,
        means: Means,
    ) -> None:
        self._room_bytes, self._usual_bytes = means.room_bytes, means.usual_bytes
        self._restore = means.restore
        self._announce = announce
        self._written_out: list[_Course] = []
        """Those that are over, of which a checkpoint is still written."""
        self._company = means.company
        self._is_restored = True
        self._model = model
        self._backend = backend
        self._diary = diary
        self._samples = _Samples(means.kept_bytes)
        self._pace = Pace("train", _SLOWEST_SECONDS_PER_FLOP, announce)
        self._courses: dict[str, _Course] = {}

    def forecast(self, asked: messages.PlanTraining, emit: Callable[[object], None]) -> "Learning":
        """What opening such a training would decide, and what that takes; emits it."""
        self._refuse_what_cannot_learn(asked.plan)
        plan, config = self._decided(asked), self._model.config
        own = self._largest_part(asked)
        if asked.batch_is_open:
            own *= plan.samples_at_once
        taken = largest(config, plan, own, self._base)
        least = largest(config, plan, [Rows(one.image, padded(1)) for one in own], self._base)
        at_once = min(len(own), plan.samples_at_once)
        what = _step_said(plan, at_once)
        self._refuse_what_never_fits(least.learnt + least.step, what, _INSTEAD)
        rehearsal = Rehearsal(own[0], at_once)
        flops = rehearsal.flops(config)
        yield Lesson(Load(flops, taken.step), flops)
        largest_open = len(own) * self._company.device_count
        emit(
            messages.TrainingForecast(
                plan=plan,
                batch_size=largest_open if asked.batch_is_open else len(asked.largest),
                parameter_count=learnt_count(config, plan),
                taken=taken,
                room_bytes=self._room_bytes,
                step_seconds=self._step_seconds(rehearsal, plan, len(own)),
            )
        )

    def _step_seconds(self, rehearsal: Rehearsal, plan: TrainingPlan, count: int) -> float | None:
        """The seconds of a step, unless there is no room to try it now."""
        self._pace.announce(rehearsal.flops(self._model.config))
        try:
            with torch.inference_mode(mode=False):
                return count * rehearsal.seconds_per_sample(self._model, self._backend, plan)
        except torch.OutOfMemoryError:
            return None

    def turn_to(
        self,
        asked: messages.OpenTraining | messages.CloseTraining,
        emit: Callable[[object], None],
    ) -> "Learning":
        """Opens a training, and emits how far it is, or closes it."""
        if self._company.is_busy:
            yield Free(self._company)
        if isinstance(asked, messages.OpenTraining):
            emit(self._open(asked))
        elif asked.session in self._courses:
            self._end(asked.session)

    def _open(self, asked: messages.OpenTraining) -> messages.TrainingOpened:
        """Begins a training, or goes on from its state."""
        self._refuse_what_cannot_learn(asked.plan)
        job, _, _ = asked.session.rpartition("/")
        for session in [one for one in self._courses if one.rpartition("/")[0] == job]:
            self._end(session)  # an earlier stretch; its call still ends
        asked = replace(asked, plan=self._decided(asked), batch_is_open=False)
        if asked.plan.full:
            self._make_ready(is_new=not asked.state)
        learnt_bytes = self._taken(asked.plan, []).learnt
        self._announce("load", _OPENING_SECONDS + learnt_bytes / _SLOWEST_BYTES_PER_SECOND)
        largest_step = max((one.step_bytes for one in self._courses.values()), default=0.0)
        what = "what it learns and what its optimiser keeps"
        self._refuse_too_much(learnt_bytes, what, "", beside=largest_step)
        state, step = _read_state(asked.state)
        with torch.inference_mode(mode=False):
            beside = self._beside(asked)
            begun = Training(self._model, self._backend, asked.plan, state, step, beside)
        try:
            self._compile(begun, asked.plan)
            self._company.follow(asked)
        except BaseException:
            begun.close()
            with suppress(ZImageError):  # some of them may have opened it
                self._company.follow(messages.CloseTraining(asked.session))
            raise
        course = _Course(begun, asked.plan, learnt_bytes, asked.low_memory)
        self._courses[asked.session] = course
        if own := self._largest_part(asked):
            course.step_bytes = largest(self._model.config, asked.plan, own, self._base).step
        count = sum(weight.numel() for weight in begun.weights.values())
        _log.info("training %s: %s numbers, from step %s on", asked.session, count, step)
        batch_size = asked.plan.samples_at_once * self._company.device_count
        return messages.TrainingOpened(step, count, asked.plan, batch_size)

    def _compile(self, begun: Training, plan: TrainingPlan) -> None:
        if not plan.compiled:
            return
        self._announce("compile", _COMPILING_SECONDS)
        try:
            with torch.inference_mode(mode=False):
                begun.try_out()
        except Exception as error:  # whatever a compiler says, a plan without it is there
            if is_sticky(error) or isinstance(error, torch.OutOfMemoryError | ZImageError):
                raise
            _log.warning("blocks of a training are not compiled", exc_info=True)
            what = str(error).strip().partition("\n")[0]
            raise NotReady(
                f"this service cannot train with compiled blocks: {type(error).__name__}: {what}",
                reason="CANNOT_TRAIN",
            ) from error

    def _largest_part(self, asked: _Thought) -> tuple[Rows, ...]:
        """Of such a batch, the most that one of the devices computes."""
        return asked.largest[: self._company.largest_part(len(asked.largest))]

    def _decided(self, asked: _Thought) -> TrainingPlan:
        """The plan with what it left open: the fastest that there is room for."""
        own = self._largest_part(asked)
        if not own:
            return careful(asked.plan)
        config, base = self._model.config, self._base
        weights = weight_bytes(config, base.element_bytes, base.form).all
        room = weights + self._usual_bytes - sum(one.learnt_bytes for one in self._courses.values())
        if asked.batch_is_open:
            found = best_batch(config, asked.plan, own[0], base, room)
        else:
            found = fitting(config, asked.plan, own, base, room)
        return found or careful(asked.plan)

    @property
    def _base(self) -> Base:
        model = self._model
        return Base(model.dtype.itemsize, model.weights, is_apart=model.device.type == "cuda")

    def _end(self, session: str) -> None:
        course = self._courses.pop(session)
        course.is_broken = True  # for whoever still waits for its next step
        course.training.close()
        self._written_out = [one for one in (*self._written_out, course) if one.is_held]
        self._company.follow(messages.CloseTraining(session))

    def _make_ready(self, *, is_new: bool) -> None:
        """For whoever learns the model itself, from what it was or from a state."""
        if self._courses or any(one.is_held for one in self._written_out):
            raise Unavailable(
                "another full training is open here",
                reason=messages.TRAINING_TAKEN,
                retry_after=_TAKEN_SECONDS,
            )
        if is_new and not self._is_restored and self._restore:
            self._restore()
        self._is_restored = False

    def _beside(self, asked: messages.OpenTraining) -> Uses:
        if asked.beside is None:
            return ()
        model = self._model
        adapter = load_adapter(asked.beside, model.config, model.device, model.dtype)
        return (Use(adapter, asked.plan.beside_scale),)

    def learn(self, asked: messages.Learn, emit: Callable[[object], None]) -> "Learning":
        """A step, in pieces of as many samples as the plan computes at once; emits its outcome."""
        course = self._course(asked.session)
        turn = Turn(course, asked.step, self._company)
        if not turn.is_there:
            yield turn
        if course.is_broken or course.training.step != asked.step:
            raise _out_of_order(course, asked.step)
        self._company.begin(asked)
        try:
            emit((yield from self._step(course, asked)))
        except BaseException:
            course.is_broken = True  # half a gradient is none
            self._company.give_up()
            raise

    def evaluate(self, asked: messages.Evaluate, emit: Callable[[object], None]) -> "Learning":
        """Samples that are looked at, one after the other; emits what was lost on them."""
        course = self._course(asked.session)
        losses = []
        for number, sample in enumerate(asked.samples):
            example = self._example(course, sample, 1.0)
            flops = LEVELS * self._forward_flops(example)
            taken = self._taken(course.plan, []).step
            yield Lesson(Load(flops, taken), (len(asked.samples) - number) * flops)
            with torch.inference_mode(mode=False), self._pace.working(flops):
                losses.append(course.training.loss_of(example, asked.first + number))
        emit(messages.Evaluated(course.training.step, sum(losses) / len(losses)))

    def checkpoint(self, asked: messages.TakeCheckpoint) -> Callable[[], messages.Checkpoint]:
        """What writes the checkpoint that is there now, in its own time."""
        course = self._course(asked.session)
        step, state = course.training.step, course.training.state()
        weights = course.training.file_tensors(getattr(torch, course.plan.save_dtype))
        if course.plan.full:
            course.is_written.clear()  # too much for a copy: the next step waits
        else:
            with torch.inference_mode(mode=False):
                state = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
                weights = iter([(name, tensor.cpu()) for name, tensor in weights])

        def write() -> messages.Checkpoint:
            try:
                file = asked.folder / "weights.safetensors"
                _save(weights, file, {**asked.about, "format": "pt", "step": str(step)})
                parts = []
                for number, part in enumerate(_parts(state)):
                    parts.append(asked.folder / f"state-{number}.safetensors")
                    _save(part.items(), parts[-1], {"step": str(step)})
                return messages.Checkpoint(step, file, tuple(parts))
            finally:
                course.is_written.set()

        return write

    def _step(
        self, course: "_Course", asked: messages.Learn
    ) -> Generator[Lesson, object, messages.Learnt]:
        waited = time.monotonic() - course.idle_since
        seconds = 0.0
        own = self._company.part(len(asked.samples))
        samples, share = asked.samples, 1 / len(asked.samples)
        examples = [self._example(course, samples[one], share) for one in own]
        plan = course.plan
        flops = [self._flops(plan, example) for example in examples]
        at_once = plan.samples_at_once
        for first in range(0, len(examples), at_once):
            end = first + at_once
            accumulates = len(examples) > at_once
            taken = self._taken(plan, examples[first:end], accumulates=accumulates).step
            what = _step_said(plan, len(examples[first:end]))
            self._refuse_too_much(taken, what, _INSTEAD, own=course.learnt_bytes)
            course.step_bytes = max(course.step_bytes, taken)
            yield Lesson(Load(sum(flops[first:end]), taken), flops_left=sum(flops[first:]))
            place = own.start + first
            seconds += self._learn_from(course, examples[first:end], place, sum(flops[first:end]))
        with torch.inference_mode(mode=False):
            outcome = course.training.take_step(self._company.shared)
        course.idle_since = time.monotonic()
        return messages.Learnt(
            step=asked.step,
            loss=outcome.loss,
            gradient_norm=outcome.gradient_norm,
            learning_rate=outcome.learning_rate,
            is_taken=outcome.is_taken,
            seconds=seconds,
            waited_seconds=waited,
            device_bytes=peak_bytes(self._model.device),
        )

    def _learn_from(
        self, course: "_Course", examples: list[Example], first: int, flops: float
    ) -> float:
        with torch.inference_mode(mode=False), self._pace.working(flops) as piece:
            course.training.learn(examples, first)
        self._diary.enter("train", piece.seconds, part(step=course.training.step + 1))
        return piece.seconds

    def _example(self, course: "_Course", sample: messages.TrainSample, share: float) -> Example:
        config, device = self._model.config, self._model.device
        read = _read_sample if course.low_memory else self._samples.tensors
        picture = read(*sample.latents)
        latents_CHW, mask_HW = picture.get("latents"), picture.get("mask")
        features_LF = _embeddings(read(*sample.caption))
        latents_CHW = _checked(
            "latents", latents_CHW, (config.in_channels, None, None), config.patch_size
        )
        features_LF = _checked("embeddings", features_LF, (None, config.cap_feat_dim))
        with torch.inference_mode(mode=False):
            if mask_HW is not None:
                mask_HW = _checked("mask", mask_HW, tuple(latents_CHW.shape[1:])).to(device).float()
                _refuse_empty(mask_HW)
            return Example(
                latents_CHW.to(device).float(),
                features_LF.to(device).to(self._model.dtype),
                sample.weight * share,
                mask_HW,
            )

    def _taken(
        self, plan: TrainingPlan, examples: list[Example], *, accumulates: bool = False
    ) -> TrainingBytes:
        """What a training takes of the device, with these examples at once."""
        rows = [Rows(padded(self._tokens(one)), padded(len(one.features_LF))) for one in examples]
        config = self._model.config
        return training_bytes(config, plan, rows, self._base, accumulates=accumulates)

    def _refuse_too_much(
        self, wanted_bytes: float, what: str, instead: str, own: float = 0.0, beside: float = 0.0
    ) -> None:
        """Beside what is a training's own already, and beside what steps of others take. Raises
        NotReady for what never fits, Unavailable for what others leave no room for."""
        self._refuse_what_never_fits(wanted_bytes, what, instead, own)
        left = self._room_bytes - sum(one.learnt_bytes for one in self._courses.values()) - beside
        if wanted_bytes > left:
            raise Unavailable(
                f"{_too_much(what, wanted_bytes)}other trainings leave {max(0, left) / 2**30:.1f}",
                reason=messages.TRAINING_TAKEN,
                retry_after=_TAKEN_SECONDS,
            )

    def _refuse_what_never_fits(
        self, wanted_bytes: float, what: str, instead: str, own: float = 0.0
    ) -> None:
        room_bytes = max(0.0, self._room_bytes - own)
        if wanted_bytes > room_bytes:
            room = f"there is room for {room_bytes / 2**30:.1f}"
            raise NotReady(
                f"{_too_much(what, wanted_bytes)}{room}{instead}",
                reason="TRAINING_MEMORY",
                fields={"given": f"{wanted_bytes:.0f}", "allowed": f"{room_bytes:.0f}"},
            )

    def _tokens(self, example: Example) -> int:
        _, height, width = example.latents_CHW.shape
        return int(height * width // self._model.config.patch_size**2)

    def _flops(self, plan: TrainingPlan, example: Example) -> float:
        return forwards(plan) * self._forward_flops(example)

    def _forward_flops(self, example: Example) -> float:
        rows = padded(len(example.features_LF))
        return float(dit_step_flops(self._model.config, [(self._tokens(example), rows)]))

    def _course(self, session: str) -> "_Course":
        if session not in self._courses:
            raise NotReady(
                f"training {session} is not open here any more; open it again from its last "
                "checkpoint",
                reason="TRAINING_NOT_OPEN",
            )
        return self._courses[session]

    def _refuse_what_cannot_learn(self, plan: TrainingPlan) -> None:
        """Kernels and weights that are for pictures alone, and those that are for one kind."""
        if plan.full and self._restore is None:
            what = "full training takes a service of its own, started with --full-training"
        elif self._restore and not plan.full:
            what = "it was started with --full-training, and learns no adapters"
        elif BACKENDS[self._backend].is_lossy:
            what = f"attention_backend {self._backend} computes no gradients; sdpa does"
        elif self._model.dtype == torch.float16:
            what = "it computes in float16, in which gradients vanish; bfloat16 or float32 do"
        elif self._model.weights == MULTIPLIED or (plan.full and self._model.weights != FULL):
            what = f"weights {self._model.weights} are for pictures; full ones learn" + (
                "" if plan.full else ", and int8, fp8 and nf4 ones carry adapters"
            )
        elif self._model.streamed_block_count:
            what = "blocks that take turns on the device (max_weight_bytes) do not train"
        else:
            return
        raise NotReady(f"this service cannot train: {what}", reason="CANNOT_TRAIN")


@dataclass(slots=True)
class _Course:
    """A training, and where it is."""

    training: Training
    plan: TrainingPlan
    learnt_bytes: float
    low_memory: bool = False
    """Whether samples are read each time."""
    step_bytes: float = 0.0
    """Of its largest piece of a step by now."""
    is_broken: bool = False
    idle_since: float = math.inf
    is_written: threading.Event = field(default_factory=threading.Event)
    """Whether the weights may change."""

    @property
    def is_held(self) -> bool:
        """Whether its weights are being written."""
        return not self.is_written.is_set()

    def __post_init__(self) -> None:
        self.idle_since = time.monotonic()
        self.is_written.set()


class _Samples:
    """What steps learn from, in host memory: those of late, from files that are not read twice."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def tensors(self, sha256: str, file: Path) -> dict[str, Tensor]:
        """Those of a file; raises InvalidRequest for one that is none."""
        if sha256 in self._kept:
            self._kept.move_to_end(sha256)
            return self._kept[sha256]
        found = self._kept[sha256] = _read_sample(sha256, file)
        self._bytes += _bytes(found)
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes(oldest)
        return found


def _embeddings(found: dict[str, Tensor]) -> Tensor | None:
    """Those of a caption, whichever form they are kept in."""
    features_LF, scale_L1 = found.get(eight_bits.TENSOR), found.get(eight_bits.SCALE)
    if features_LF is None or scale_L1 is None:
        return features_LF
    scale_L1 = _checked(eight_bits.SCALE, scale_L1, (len(features_LF), 1))
    return features_LF.float() * scale_L1


def _read_sample(sha256: str, file: Path) -> dict[str, Tensor]:
    """Those of the file's tensors that steps learn from, by their names; raises InvalidRequest for
    a file that is none."""
    try:
        with torch.inference_mode(mode=False), safe_open(file, framework="pt") as there:
            names = [name for name in _LEARNT_FROM if name in there.keys()]  # noqa: SIM118
            return {name: there.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InvalidRequest.given(
            "sample", f"file {sha256} ({error})", "safetensors", "TRAIN_SAMPLE"
        ) from error


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _checked(
    name: str, tensor: Tensor | None, sizes: tuple[int | None, ...], multiple: int | None = None
) -> Tensor:
    """The tensor; raises InvalidRequest for what this model cannot learn from."""
    if tensor is None:
        raise InvalidRequest.given(name, "a file without", f"a tensor {name}", "TRAIN_SAMPLE")
    fits = tensor.ndim == len(sizes) and all(
        given == wanted if wanted is not None else given > 0 and given % (multiple or 1) == 0
        for given, wanted in zip(tensor.shape, sizes, strict=True)
    )
    if not fits or not tensor.is_floating_point():
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        more = f" by multiples of {multiple}" if multiple else ""
        given = f"{tensor.dtype} {list(tensor.shape)}"
        raise InvalidRequest.given(name, given, f"floats [{wanted}]{more}", "TRAIN_SAMPLE")
    if not tensor.float().isfinite().all():
        raise InvalidRequest.given(name, "values that are no numbers", "numbers", "TRAIN_SAMPLE")
    return tensor


def _refuse_empty(mask_HW: Tensor) -> None:
    if bool((mask_HW < 0).any()) or not bool((mask_HW > 0).any()):
        given, allowed = "weights below 0, or none above", "weights from 0, some above"
        raise InvalidRequest.given("mask", given, allowed, "TRAIN_SAMPLE")


def _save(tensors: Iterable[tuple[str, Tensor]], file: Path, about: dict[str, str]) -> None:
    save_file({name: one.cpu().contiguous() for name, one in tensors}, file, metadata=about)


def _parts(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Of one file each."""
    part: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if part and _bytes(part) + tensor.nbytes > _PART_BYTES:
            yield part
            part = {}
        part[name] = tensor
    yield part


def _read_state(files: Sequence[Path]) -> tuple[dict[str, Tensor], int]:
    """Mapped rather than read."""
    state: dict[str, Tensor] = {}
    step = 0
    try:
        for file in files:
            with torch.inference_mode(mode=False), safe_open(file, framework="pt") as tensors:
                step = int((tensors.metadata() or {})["step"])
                state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        return state, step
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InvalidRequest.given(
            "open.state", f"a file that is none ({error})", "a checkpoint's state", "TRAINING_STATE"
        ) from error


def _step_said(plan: TrainingPlan, sample_count: int) -> str:
    return f"{sample_count} samples at once, recompute {plan.recompute}"


def _too_much(what: str, wanted_bytes: float) -> str:
    return f"{what}: that takes {wanted_bytes / 2**30:.1f} GiB of the device, and "


def _out_of_order(course: _Course, step: int) -> NotReady:
    if course.is_broken:
        what = "a step of this training failed; open it again from its last checkpoint"
    else:
        what = f"step {step} was sent, and step {course.training.step} is the next"
    return NotReady(what, reason="TRAINING_ORDER")
