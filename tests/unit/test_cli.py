import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.fakes import services
from tests.fakes.services import Act, FakeDit, FakeEncoder, Step
from zimage_client import Accepted, Progress, Waiting
from zimage_client.cli.main import main
from zimage_client.cli.progress import ProgressText
from zimage_client.cli.terminal import Terminal
from zimage_core.errors import (
    Forbidden,
    InternalError,
    InvalidRequest,
    NotReady,
    Overloaded,
    ZImageError,
)
from zimage_core.formats import embedding as embedding_file
from zimage_rpc.dit.v1 import dit_pb2

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def dit() -> FakeDit:
    return FakeDit()


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def stack(
    dit: FakeDit, encoder: FakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[services.Addresses]:
    """Fakes to talk to, from an empty folder, named by the environment."""
    monkeypatch.chdir(tmp_path)
    with services.serving_aside(dit, encoder) as addresses:
        monkeypatch.setenv("ZIMAGE_SERVER", addresses.server)
        yield addresses


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


@pytest.mark.usefixtures("stack")
class TestGenerate:
    def test_the_picture_lies_where_the_line_says(self, dit: FakeDit, capsys: Captured) -> None:
        assert main(["generate", "a red circle", "-o", "out.png", "--seed", "7"]) == 0
        assert Path("out.png").read_bytes() == services.picture(dit.specs[0])
        shown = capsys.readouterr()
        assert re.fullmatch(r"out\.png  seed 7  \d+\.\d s\n", shown.out)
        assert shown.err == ""
        assert files() == ["out.png"]

    def test_without_a_name_the_seed_is_the_name(self, dit: FakeDit, capsys: Captured) -> None:
        assert main(["generate", "x"]) == 0
        seed = dit.specs[0].seed
        assert files() == [f"zimage-{seed}.png"]
        assert f"seed {seed} " in capsys.readouterr().out

    def test_several_pictures_are_numbered(self, capsys: Captured) -> None:
        assert main(["generate", "x", "-o", "out.png", "--seed", "7", "--count", "3"]) == 0
        assert files() == ["out-0.png", "out-1.png", "out-2.png"]
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == files()
        assert [line.split()[2] for line in lines] == ["7", "8", "9"]

    def test_json_is_one_object_a_line(self, capsys: Captured) -> None:
        assert main(["generate", "x", "-o", "o.png", "--seed", "7", "--count", "2", "--json"]) == 0
        first, second = map(json.loads, capsys.readouterr().out.splitlines())
        assert (first["path"], first["seed"], first["index"]) == ("o-0.png", 7, 0)
        assert (second["path"], second["seed"], second["width"]) == ("o-1.png", 8, 128)
        assert first["media_type"] == "image/png"

    def test_sides_are_snapped_and_told(self, dit: FakeDit, capsys: Captured) -> None:
        assert main(["generate", "x", "--width", "1000", "--height", "5"]) == 0
        assert (dit.specs[0].width_px, dit.specs[0].height_px) == (1008, 16)
        said = capsys.readouterr().err
        assert "--width 1000 is no multiple of 16: 1008 is used" in said
        assert "--height 5 is no multiple of 16: 16 is used" in said

    def test_sides_that_are_none_are_left_to_the_server(self, dit: FakeDit) -> None:
        assert main(["generate", "x", "--width", "-3"]) == 0
        assert dit.specs[0].width_px == -3

    def test_every_flag_reaches_the_server(self, dit: FakeDit) -> None:
        flags = (
            "--system-prompt s --thinking-content t --assistant-content a --force-think-block "
            "--strip-quotes --hidden-layer -3 --width 32 --height 48 --seed -1 --count 2 --steps 3 "
            "--guidance 0 --force-guidance --negative-prompt n --cfg-normalization 1.5 "
            "--cfg-truncation 0.5 --shift 3.5 --schedule legacy --format webp --quality 80 "
            "-o out.webp"
        )
        assert main(["generate", "x", *flags.split()]) == 0
        (spec,) = dit.specs
        prompt = spec.positive.segments[0].prompt
        assert (prompt.text, prompt.system, prompt.thinking, prompt.assistant) == tuple("xsta")
        assert prompt.force_think_block
        assert prompt.strip_quotes
        assert prompt.hidden_layer == -3
        assert spec.negative.segments[0].prompt.text == "n"
        assert (spec.width_px, spec.height_px, spec.seed, spec.image_count) == (32, 48, -1, 2)
        assert spec.HasField("guidance_scale")
        assert (spec.step_count, spec.guidance_scale) == (3, 0)
        assert spec.z_image == dit_pb2.ZImageOptions(
            force_guidance=True, cfg_normalization=1.5, cfg_truncation=0.5
        )
        assert spec.schedule == dit_pb2.Schedule(rule=dit_pb2.Schedule.RULE_LEGACY, shift=3.5)
        assert spec.output == dit_pb2.Output(format=dit_pb2.Output.FORMAT_WEBP, quality=80)

    def test_flags_that_are_not_given_are_unset(self, dit: FakeDit) -> None:
        assert main(["generate", "x"]) == 0
        (spec,) = dit.specs
        given = {descriptor.name for descriptor, _ in spec.ListFields()}
        assert given == {"positive", "seed"}
        assert not spec.positive.segments[0].prompt.HasField("hidden_layer")

    def test_sigmas_are_a_list(self, dit: FakeDit) -> None:
        assert main(["generate", "x", "--sigmas", "1,0.5,.25"]) == 0
        assert list(dit.specs[0].schedule.sigmas) == [1.0, 0.5, 0.25]

    def test_the_name_says_the_format(self, dit: FakeDit) -> None:
        assert main(["generate", "x", "-o", "out.jpg"]) == 0
        assert dit.specs[0].output.format == dit_pb2.Output.FORMAT_JPEG

    def test_an_existing_file_is_refused_before_anything_runs(
        self, dit: FakeDit, capsys: Captured
    ) -> None:
        Path("out-1.png").write_text("precious")
        command = ["generate", "x", "-o", "out.png", "--count", "2"]
        assert main(command) == 2
        assert capsys.readouterr().err == (
            "error: out-1.png exists; choose another name or add --overwrite\n"
        )
        assert dit.specs == []
        assert main([*command, "--overwrite"]) == 0
        assert Path("out-1.png").read_bytes() == services.picture(dit.specs[0], 1)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ([], "give either a PROMPT or --embedding FILE"),
            (["x", "--embedding", "e.safetensors"], "give either"),
            (
                ["--embedding", "e", "--system-prompt", "s"],
                "--system-prompt has no effect without a PROMPT",
            ),
            (["x", "-o", "out.png", "--format", "jpeg"], "does not fit out.png"),
            (["x", "-o", "out.gif"], "known are .png, .jpg, .jpeg, .webp"),
            (["x", "-o", "out.gif", "--format", "png"], "known are .png"),
            (["x", "--count", "100000000"], "10000 pictures are the most"),
            (["x", "-o", "nowhere/out.png"], "folder nowhere does not exist"),
            (["x", "-o", "."], "is a folder"),
            (["x", "--server", "http://localhost"], "no address; give host:port, grpcs:"),
        ],
    )
    def test_a_wrong_command_line_is_one_line_and_exit_code_2(
        self, flags: list[str], said: str, dit: FakeDit, capsys: Captured
    ) -> None:
        assert main(["generate", *flags]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ")
        assert said in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""
        assert dit.specs == []

    @pytest.mark.parametrize(
        ("flags", "said", "code"),
        [
            (["x", "--width", str(1 << 40)], "error: width: ", 3),
            (["x", "--seed", str(1 << 70)], "error: seed: ", 3),
            (["caf\udce9"], "error: the prompt's text has no UTF-8 form", 3),
            (["x", "--system-prompt", "caf\udce9"], "error: the prompt's system has", 3),
            (["x", "--negative-prompt", "caf\udce9"], "error: the prompt's text has", 3),
            (["x", "--encoder", "localhost:1"], "error: --encoder without --server", 2),
        ],
    )
    def test_what_is_wrong_is_said_before_the_embedded_stack_starts(
        self,
        flags: list[str],
        said: str,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Captured,
    ) -> None:
        monkeypatch.delenv("ZIMAGE_SERVER")
        assert main(["generate", *flags]) == code
        assert capsys.readouterr().err.startswith(said)

    def test_an_error_is_an_object_for_programs(self, capsys: Captured) -> None:
        assert main(["generate", "x", "--width", str(1 << 40), "--json"]) == 3
        shown = capsys.readouterr()
        told = json.loads(shown.out)
        assert told["error"].startswith("width: ")
        assert (told["reason"], told["fields"]["field"]) == ("OPTION", "width")
        assert shown.err == f"error: {told['error']}\n"

    def test_a_name_without_a_suffix_is_kept(self, dit: FakeDit) -> None:
        assert main(["generate", "x", "-o", "out"]) == 0
        assert not dit.specs[0].HasField("output")
        assert main(["generate", "x", "-o", "other", "--format", "webp"]) == 0
        assert dit.specs[1].output.format == dit_pb2.Output.FORMAT_WEBP
        assert files() == ["other", "out"]

    def test_what_guidance_alone_uses_is_told_where_it_is_off(self, capsys: Captured) -> None:
        flags = ["--negative-prompt", "n", "--cfg-truncation", "0.5"]
        off = "has no effect: guidance is off"
        for given, why in (([], ", as this model has it by default"), (["--guidance", "0"], "")):
            assert main(["generate", "x", "-o", f"{len(why)}.png", *flags, *given]) == 0
            told = f"--negative-prompt {off}{why}\n--cfg-truncation {off}{why}\n"
            assert capsys.readouterr().err == told
        assert main(["generate", "x", "-o", "on.png", *flags, "--guidance", "2"]) == 0
        assert capsys.readouterr().err == ""

    def test_a_negative_in_the_file_is_used_unless_another_is_given(self, dit: FakeDit) -> None:
        rows = torch.zeros(2, services.WIDTH)
        save_file({"embeddings": rows, "negative_embeddings": rows + 1}, "both.safetensors")
        both = ["generate", "--embedding", "both.safetensors"]
        assert main(both) == 0
        assert main([*both, "--negative-prompt", "n", "-o", "other.png"]) == 0
        first, second = (spec.negative.segments[0] for spec in dit.specs)
        sent = first.embedding.tensors["embeddings"].data
        assert sent == (rows + 1).numpy().tobytes()
        assert second.prompt.text == "n"

    def test_a_terminal_that_lacks_letters_gets_their_numbers(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = io.BytesIO()
        for name in ("stdout", "stderr"):
            ascii_only = io.TextIOWrapper(written, encoding="ascii")
            monkeypatch.setattr(sys, name, ascii_only)
        assert main(["generate", "x", "-o", "\u00e9.png"]) == 0
        assert main(["generate", "x", "-o", "\u00e9.png"]) == 2
        assert written.getvalue().decode("ascii").count("\\xe9.png") == 2

    @pytest.mark.parametrize(
        "flags",
        [
            ["x", "--schedule", "karras"],
            ["x", "--sigmas", "1,high"],
            ["x", "--width", "wide"],
            ["x", "--negative-prompt", "n", "--negative-embedding", "e"],
            ["x", "--over"],
            *[["x", "--timeout", seconds] for seconds in ("inf", "nan", "0", "-1", "soon")],
        ],
    )
    def test_what_cannot_be_parsed_is_exit_code_2(self, flags: list[str], capsys: Captured) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["generate", *flags])
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (InvalidRequest("no such size"), 3),
            (NotReady("another encoder"), 3),
            (Overloaded("too large", reason="DEVICE_MEMORY"), 3),
            (Forbidden("not yours"), 3),
            (InternalError("internal error", fields={"request_id": "abc"}), 1),
            (Act.BREAK, 4),
        ],
    )
    def test_errors_are_readable_and_have_their_exit_codes(
        self, error: Step, code: int, dit: FakeDit, capsys: Captured
    ) -> None:
        dit.scripts.extend([[error]] * 100)  # some are tried again until the timeout
        assert main(["generate", "x", "--timeout", "2"]) == code
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ")
        if isinstance(error, ZImageError):
            assert error.message in shown.err
        assert "Traceback" not in shown.err
        assert files() == []

    def test_a_service_that_hangs_is_exit_code_1(self, dit: FakeDit) -> None:
        dit.scripts.append([Act.HOLD])
        assert main(["generate", "x", "--timeout", "2"]) == 1
        assert dit.cancelled.wait(10)

    def test_a_damaged_picture_leaves_no_file(self, dit: FakeDit) -> None:
        spec = dit_pb2.GenerateSpec(seed=1)
        dit.scripts.append(
            [services.accepted(spec), *services.pieces(0, b"some bytes", sha256="00" * 32)]
        )
        assert main(["generate", "x", "-o", "out.png"]) == 1
        assert files() == []

    def test_an_encoder_on_this_side_is_used(
        self, stack: services.Addresses, dit: FakeDit, encoder: FakeEncoder
    ) -> None:
        assert main(["generate", "abc", "--guidance", "0", "--encoder", stack.encoder]) == 0
        assert dit.specs[0].positive.segments[0].HasField("embedding")
        assert [prompt.text for prompt in encoder.prompts] == ["abc"]

    def test_ctrl_c_cancels_on_the_server_and_leaves_nothing(self, dit: FakeDit) -> None:
        spec = dit_pb2.GenerateSpec(seed=1)
        first_half, _ = services.pieces(0, b"some bytes")
        dit.scripts.append([services.accepted(spec), first_half, Act.HOLD])
        command = [sys.executable, "-m", "zimage_client.cli.main", "generate", "x", "-o", "out.png"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert dit.holding.wait(30)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert said == "interrupted\n"
        assert dit.cancelled.wait(10)
        assert files() == []


@pytest.mark.usefixtures("stack")
class TestEncode:
    def test_encode_here_generate_there(
        self, stack: services.Addresses, dit: FakeDit, encoder: FakeEncoder, capsys: Captured
    ) -> None:
        flags = ["--encoder", stack.encoder, "--system-prompt", "s"]
        assert main(["encode", "abc", "-o", "p.safetensors", *flags]) == 0
        assert re.fullmatch(r"p\.safetensors  4 tokens  \d+\.\d s\n", capsys.readouterr().out)
        content = embedding_file.read(Path("p.safetensors"))
        assert content.prompt is not None
        assert (content.prompt.text, content.prompt.system) == ("abc", "s")

        both = ["encode", "abc", "--negative-prompt", "n", "-o", "both.safetensors", "--no-prompt"]
        assert main([*both, "--encoder", stack.encoder]) == 0
        content_of_both = embedding_file.read(Path("both.safetensors"))
        assert content_of_both.negative is not None
        assert content_of_both.negative.token_count == 2
        assert content_of_both.prompt is content_of_both.negative_prompt is None

        files_given = ["--embedding", "p.safetensors", "--negative-embedding", "p.safetensors"]
        assert main(["generate", *files_given]) == 0
        (spec,) = dit.specs
        sent = spec.positive.segments[0].embedding
        assert sent.tensors["embeddings"].data == content.embedding.tensor.data
        assert sent.identity.sha256 == content.embedding.identity
        assert spec.negative == spec.positive
        assert len(encoder.prompts) == 3

    def test_json_and_a_file_without_the_text(
        self, stack: services.Addresses, capsys: Captured
    ) -> None:
        flags = ["--encoder", stack.encoder, "--no-prompt", "--json"]
        assert main(["encode", "abc", "-o", "p.safetensors", *flags]) == 0
        line = json.loads(capsys.readouterr().out)
        content = embedding_file.read(Path("p.safetensors"))
        assert content.prompt is None
        assert line["sha256"] == content.embedding.tensor.sha256
        assert (line["token_count"], line["width"]) == (4, services.WIDTH)

    def test_an_existing_file_is_refused_before_anything_runs(
        self, stack: services.Addresses, encoder: FakeEncoder
    ) -> None:
        Path("p.safetensors").write_text("precious")
        command = ["encode", "abc", "-o", "p.safetensors", "--encoder", stack.encoder]
        assert main(command) == 2
        assert encoder.prompts == []
        assert main([*command, "--overwrite"]) == 0

    @pytest.mark.parametrize(
        ("flags", "said"), [(["abc"], "-o FILE"), (["-o", "p.safetensors"], "give a PROMPT")]
    )
    def test_what_is_missing_is_exit_code_2(
        self, flags: list[str], said: str, capsys: Captured
    ) -> None:
        assert main(["encode", *flags]) == 2
        assert said in capsys.readouterr().err

    def test_half_a_character_is_exit_code_3(self, capsys: Captured) -> None:
        assert main(["encode", "caf\udce9", "-o", "p.safetensors"]) == 3
        assert "no UTF-8 form" in capsys.readouterr().err

    def test_what_is_no_timeout_is_exit_code_2(self, capsys: Captured) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["encode", "abc", "-o", "p.safetensors", "--timeout", "0"])
        assert caught.value.code == 2
        assert "--timeout" in capsys.readouterr().err

    def test_a_server_alone_does_not_encode(self, capsys: Captured) -> None:
        assert main(["encode", "abc", "-o", "p.safetensors"]) == 2
        assert "give --encoder ADDR" in capsys.readouterr().err

    def test_a_file_that_is_none_is_exit_code_3(self, capsys: Captured) -> None:
        assert main(["generate", "--embedding", "gone.safetensors"]) == 3
        Path("old.pt").write_bytes(b"PK\x03\x04")
        assert main(["generate", "--embedding", "old.pt"]) == 3
        assert "torch.load" in capsys.readouterr().err


class TestSettings:
    def test_the_version_is_told(self, capsys: Captured) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert re.match(r"\d+\.\d+\.\d+", capsys.readouterr().out)

    def test_effective_settings_are_shown_with_their_origin(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
    ) -> None:
        config = tmp_path / "config.toml"
        config.write_text('[default.client]\nserver = "a:1"\n[other.client]\nencoder = "b:2"\n')
        monkeypatch.setenv("ZIMAGE_SERVER", "c:3")
        flags = ["--config", str(config), "--profile", "other", "--print-config"]
        assert main(["generate", *flags]) == 0
        shown = capsys.readouterr().out
        assert 'server = "c:3"  # environment\n' in shown
        assert f'encoder = "b:2"  # [other.client] in {config}\n' in shown
        assert main(["encode", *flags]) == 0
        assert capsys.readouterr().out == shown

    def test_a_broken_settings_file_is_exit_code_2(self, tmp_path: Path, capsys: Captured) -> None:
        config = tmp_path / "config.toml"
        config.write_text("[default.client]\nservr = 'a:1'\n")
        assert main(["generate", "x", "--config", str(config)]) == 2
        assert "did you mean server?" in capsys.readouterr().err


class Screen(io.StringIO):
    """A terminal that remembers all that was written."""

    def isatty(self) -> bool:
        return True


class TestLiveLine:
    def test_a_line_replaces_the_one_before_and_results_stand_alone(self) -> None:
        screen = Screen()
        terminal = Terminal(screen, screen)
        terminal.live("step 1/8 is a long line")
        terminal.live("step 2/8")
        terminal.result("out.png")
        shown = [part.rstrip(" ") for part in screen.getvalue().split("\r")]
        assert shown == ["", "step 1/8 is a long line", "step 2/8", "", "out.png\n"]

    def test_a_line_never_wraps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        screen = Screen()
        terminal = Terminal(screen, screen)
        terminal.live("long " * 200)
        assert len(screen.getvalue()) <= 80

    def test_a_file_gets_no_live_line(self) -> None:
        out = io.StringIO()
        terminal = Terminal(out, out)
        terminal.live("step 1/8")
        terminal.clear()
        assert out.getvalue() == ""

    def test_what_goes_on_is_told_in_words(self) -> None:
        now = 0.0
        text = ProgressText(clock=lambda: now)
        accepted = Accepted(
            width=64,
            height=64,
            seed=1,
            count=2,
            steps=4,
            guidance=0.0,
            schedule="official",
            shift=3.0,
            sigmas=(1.0, 0.0),
            force_guidance=False,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            format="png",
            quality=None,
            metadata="receipt",
            packing="shared",
            previews="",
            preview_interval=0,
            priority="normal",
            adapters=(),
            forward_count=8,
            queue_position=2,
            expected_seconds=12.4,
        )
        assert text.of(accepted) == "queued, 2 others under way, about 12 s left"
        assert text.of(Progress("encoding")) == "encoding"
        assert text.of(Progress("denoising", 0, 1, 4)) == "picture 1 of 2: step 1/4"
        now = 1.0
        progress = Progress("denoising", 0, 3, 4, expected_seconds=5.0)
        assert text.of(progress) == "picture 1 of 2: step 3/4, 0.50 s/step, about 5 s left"
        assert text.of(Progress("decoding", 0)) == "picture 1 of 2: decoding"
        assert text.of(Progress("denoising", 1, 1, 4)) == "picture 2 of 2: step 1/4"
        assert text.of(Waiting("LOADING", "it loads", 1.0)) == "it loads; trying again in 1.0 s"


class TestCompletion:
    def test_a_shell_completes_commands_flags_and_choices(self, capsys: Captured) -> None:
        assert main(["completion", "bash"]) == 0
        script = capsys.readouterr().out
        for words, completed in (
            ("zimage-client gen", "generate"),
            ("zimage-client generate --neg", "--negative-prompt --negative-embedding"),
            ("zimage-client generate --format w", "webp"),
        ):
            ask = (
                f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
                "_shtab_zimage_client; echo ${COMPREPLY[@]}"
            )
            shell = ["bash", "-c", f"{script}\n{ask}"]
            answer = subprocess.run(shell, capture_output=True, text=True, check=True)
            assert answer.stdout.split() == completed.split(), answer.stderr

    def test_a_shell_is_needed(self) -> None:
        assert main(["completion"]) == 2
