"""Prompts from files, and samples to files that carry their recipe."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np

from genssm import notes, provenance
from genssm.codec import Audio, Codec, Image, Raw
from genssm.data import SOUNDS, read_picture, read_sound
from genssm.disk import replace_file
from genssm.pipeline import Pipeline
from genssm.provenance import Recipe, RecipeError
from genssm.session import Sample

SUFFIXES = {"text": ".txt", "image": ".png", "audio": ".wav"}  # of a file by modality


def read_prompt(codec: Codec, prompt: str | None, stdin: TextIO) -> Raw:
    """What ``--prompt`` means to a codec: text, the name of a class, or the content of a file.

    Raises ValueError when it is none of these.
    """
    if prompt is None:
        return None
    if codec.modality == "text":
        return _read_text(prompt, stdin)
    if prompt in (*codec.labels, "any"):
        return prompt
    file = Path(prompt)
    if not file.is_file():
        raise ValueError(
            f"{prompt!r} is neither a file nor a class of this {codec.modality} model; "
            f"classes: {', '.join((*codec.labels, 'any'))}"
        )
    with file.open("rb") as handle:
        if isinstance(codec, Image):
            return codec.fit(read_picture(handle, codec, file.name))
        assert isinstance(codec, Audio)
        return read_sound(handle, codec, file.name)


def _read_text(prompt: str, stdin: TextIO) -> str:
    try:
        if prompt.endswith(".txt"):
            content = Path(prompt).read_bytes()
        elif prompt == "-":
            content = stdin.buffer.read()
        else:  # bytes that the locale does not know came as surrogates
            content = prompt.encode("utf-8", "surrogateescape")
        return content.decode()
    except OSError as error:
        raise ValueError(f"cannot read the prompt {prompt!r}: {error.strerror}") from error
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"the prompt {prompt!r} is not UTF-8 text (byte {error.start}); convert it"
        ) from error


def read_recipe(path: str | Path) -> Recipe:
    """The recipe inside a PNG or WAV file, or of the lines of ``--json``.

    Raises RecipeError for a file that cannot be read, holds none, or holds a damaged one.
    """
    path, name = Path(path), repr(str(path))
    try:
        note = notes.find(path)
        if note is not None:
            return provenance.parse(note)
        if path.suffix.lower() not in (".json", ".jsonl"):
            raise RecipeError("it has no recipe; PNG, WAV and --json files by genssm carry one")
        with path.open("rb") as file:
            return provenance.join(list(_recipes_of_lines(file)))
    except OSError as error:
        raise RecipeError(f"cannot read {name}: {error.strerror}") from error
    except RecursionError as error:
        raise RecipeError(f"cannot repeat {name}: it is not JSON") from error
    except ValueError as error:
        problem = error if isinstance(error, RecipeError | notes.NoteError) else "it is not JSON"
        raise RecipeError(f"cannot repeat {name}: {problem}") from error


def _recipes_of_lines(file: IO[bytes]) -> Iterator[Recipe]:
    count = 0
    while line := file.readline(notes.LARGEST + 1):
        if len(line) > notes.LARGEST:
            raise RecipeError(f"a line is longer than {notes.LARGEST} bytes")
        if not line.strip():
            continue
        count += 1
        if count > provenance.MOST_SAMPLES:
            raise RecipeError(f"it has more than {provenance.MOST_SAMPLES} lines")
        facts = json.loads(line)
        yield provenance.from_json(facts.get("recipe") if isinstance(facts, dict) else None)


def likelihood(pipe: Pipeline, raw: Raw, label: str | None) -> dict[str, Any]:
    """What ``genssm score`` prints: bits in total, per unit and per token."""
    bits = pipe.token_bits(raw, label)
    total, units = float(bits.double().sum()), pipe.codec.units(raw)
    if units == 0:
        raise ValueError("there is nothing to score")
    return {
        "bits": total,
        "value": total / units,
        "unit": pipe.codec.unit,
        "units": units,
        "token_bits": [round(b, 4) for b in bits.tolist()],
    }


def classification(pipe: Pipeline, raw: Raw) -> dict[str, Any]:
    """What ``genssm score --classify`` prints: the classes, the most probable first."""
    ordered = sorted(pipe.classify(raw).items(), key=lambda item: -item[1])
    return {"classes": dict(ordered)}


def check_kind(path: Path) -> None:
    """Refuse what is there and no file: a device would be replaced by one."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise ValueError(f"{str(path)!r} is {kind}; give the name of a file")


def check_target(path: Path, force: bool) -> None:
    """Refuse a file that cannot be written or would be lost."""
    folder = str(path.parent)
    check_kind(path)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {folder!r}")
    if os.path.lexists(path) and not force:  # also as a link to nothing
        raise FileExistsError(f"{str(path)!r} exists; use --force (force=True) to overwrite it")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"cannot write in the folder {folder!r}: {error.strerror}; give another"
        ) from error


@contextmanager
def claimed(paths: Sequence[Path], force: bool) -> Iterator[None]:
    """Keep files for the body to write, unless they may be replaced.

    Raises FileExistsError, before the body, if one is there: another process may have made it since
    ``check_target``.
    """
    made: list[Path] = []
    try:
        for path in () if force else paths:
            try:
                path.touch(exist_ok=False)
            except FileExistsError as error:
                raise FileExistsError(
                    f"{str(path)!r} has been made meanwhile; use --force (force=True) to "
                    "overwrite it"
                ) from error
            made.append(path)
        yield
    finally:
        for path in made:
            if path.exists() and path.stat().st_size == 0:  # the body did not write it
                path.unlink()


class Output:
    """Where the samples of one command go: decided, and refused, before anything is drawn.

    ``target``: None (text on stdout), "-" (bytes on stdout) or a path. ``prompt``: as it was given,
    for the recipes. ``pause``: seconds between sounds that share one file; None for a file each.
    """

    def __init__(
        self, pipe: Pipeline, out: str | None, count: int, force: bool,
        prompt: str | None = None, pause: float | None = None,
    ) -> None:  # fmt: skip
        self.pipe, self.count, self.prompt, self.pause = pipe, count, prompt, pause
        suffixes = {"text": (), "image": (".png",), "audio": SOUNDS[:3]}[pipe.modality]
        self.target: str | Path | None = "-" if out == "-" else None
        if out not in (None, "-"):
            self.target = Path(out)
            if suffixes and self.target.suffix.lower() not in suffixes:
                raise ValueError(
                    f"a file by this {pipe.modality} model must end in {', '.join(suffixes)}, "
                    f"got {out!r}"
                )
        elif out is None and suffixes:
            self.target = self._unused(suffixes[0])
        if out == "-" and pipe.modality == "audio" and count > 1:
            raise ValueError("several clips cannot share stdout; give --out FILE or --count 1")
        self.force, self.named = force, out is not None
        for path in self.paths():
            check_target(path, force)
        if isinstance(pipe.codec, Audio):  # refused now, not when all is drawn
            self._sound(np.zeros(1, np.float32))

    def _unused(self, suffix: str) -> Path:
        folder = Path(self.pipe.name)
        stem = folder.name if folder.name not in ("", "..") else folder.resolve().name
        n = 1
        while any(map(os.path.lexists, self._numbered(Path(f"{stem}-{n}{suffix}")))):
            n += 1
        return Path(f"{stem}-{n}{suffix}")

    def _numbered(self, path: Path) -> list[Path]:
        if self.pipe.modality != "audio" or self.count == 1:
            return [path]  # a grid, or all texts in one file
        return [path.with_stem(f"{path.stem}-{i}") for i in range(1, self.count + 1)]

    def paths(self) -> list[Path]:
        """The files that will be written."""
        return self._numbered(self.target) if isinstance(self.target, Path) else []

    def write(self, samples: list[Sample]) -> list[str | None]:
        """Write the samples; returns the file of each."""
        if self.target is None or not samples:
            return [None] * len(samples)
        contents = self._contents(samples)
        if self.target == "-":
            for content in contents:
                sys.stdout.buffer.write(content)
            return ["-"] * len(samples)
        with ExitStack() as claims:
            paths = self._claim(len(contents), claims)
            for path, content in zip(paths, contents, strict=True):
                replace_file(path, lambda file, content=content: file.write_bytes(content))
        names: list[str | None] = [str(p) for p in paths]
        return names if len(names) == len(samples) else names * len(samples)

    def _claim(self, count: int, claims: ExitStack) -> list[Path]:
        """The first files, claimed; of other names if a process has taken those of our own."""
        while True:
            paths = self.paths()[:count]
            try:
                claims.enter_context(claimed(paths, self.force))
                return paths
            except FileExistsError:
                if self.named:
                    raise
                assert isinstance(self.target, Path)
                self.target = self._unused(self.target.suffix)

    def _contents(self, samples: list[Sample]) -> list[bytes]:
        codec = self.pipe.codec
        if isinstance(codec, Image):
            return [self._noted(png(grid([s.raw for s in samples])), samples)]
        if isinstance(codec, Audio):
            if self.pause is not None:
                return [sounds_in_a_row(self.pipe, samples, self.pause, self.prompt, self._kind)]
            return [self._noted(self._sound(s.raw), [s]) for s in samples]
        return ["".join(f"{s.raw}\n" for s in samples).encode()]

    @property
    def _kind(self) -> str:
        """Of a sound file: wav, flac or ogg."""
        assert self.target is not None
        return (Path(self.target).suffix.lower() or ".wav").removeprefix(".")

    def _sound(self, wave: np.ndarray) -> bytes:
        assert isinstance(self.pipe.codec, Audio)
        return sound(wave, self.pipe.codec.rate, self._kind)

    def _noted(self, content: bytes, samples: list[Sample]) -> bytes:
        return noted(content, self.pipe.recipe(samples, self.prompt))

    def facts(self, sample: Sample, file: str | None) -> dict[str, Any]:
        """One line of ``--json``."""
        made = self.pipe.recipe([sample], self.prompt)
        content = {"text": sample.raw} if sample.modality == "text" else {"file": file}
        return {
            "model": self.pipe.name,
            "modality": sample.modality,
            "prompt": self.prompt,
            **content,
            "tokens": len(sample.tokens),
            "seed": sample.seed,
            "index": sample.index,
            "finish": sample.finish,
            "seconds": round(sample.seconds, 4),
            "tokens_per_second": round(sample.tokens_per_second, 1),
            "bits": round(sample.bits, 4),
            "engine": self.pipe.engine_name,
            "token_bits": [round(bits, 4) for bits in sample.token_bits],
            "recipe": None if made is None else made.to_json(),
        }

    def preview(self, samples: list[Sample]) -> str:
        """The pictures in half blocks for a true-colour terminal; empty for text and sound."""
        if self.pipe.modality != "image":
            return ""
        return half_blocks(grid([s.raw for s in samples[:4]], columns=4))


def write_samples(
    pipe: Pipeline,
    samples: Sequence[Sample],
    path: str | Path,
    *,
    prompt: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write samples of one call as ``genssm sample --out`` does; returns the files.

    Pictures go into one PNG, in a grid; clips into WAV, FLAC or OGG files, numbered if there are
    several; texts into one file. PNG and WAV hold the recipe, in which ``prompt`` is a note for
    people; see ``read_recipe``. Raises ValueError for a file that cannot be such a one and for
    samples of several calls or another model, FileExistsError, unless ``force``, for a file that is
    there.
    """
    if not samples:
        raise ValueError("there are no samples to write")
    if str(path) == "-":
        raise ValueError("samples are written to a file; got '-'")
    output = Output(pipe, str(Path(path).expanduser()), len(samples), force, prompt)
    output.write(list(samples))
    return output.paths()


def noted(content: bytes, made: Recipe | None) -> bytes:
    """A PNG or WAV file with a recipe inside, if there is one."""
    return content if made is None else notes.add(content, json.dumps(made.to_json()))


def sounds_in_a_row(
    pipe: Pipeline, samples: Sequence[Sample], pause: float, prompt: str | None, kind: str = "wav"
) -> bytes:
    """Samples of sound one after the other, ``pause`` seconds between them, as a sound file.

    A WAV file holds the recipe of all.
    """
    assert isinstance(pipe.codec, Audio)
    silence = np.zeros(round(pause * pipe.codec.rate), np.float32)
    waves = [wave for sample in samples for wave in (silence, sample.raw)]
    content = sound(np.concatenate(waves[1:]), pipe.codec.rate, kind)
    return noted(content, pipe.recipe_of_row(samples, pause, prompt))


def grid(pictures: list[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Pictures (H, W, C) side by side in a nearly square grid, white between them."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height, width, channels = pictures[0].shape
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for i, picture in enumerate(pictures):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[y : y + height, x : x + width] = picture
    return canvas


def png(array: np.ndarray) -> bytes:
    """uint8 (H, W, C) as a PNG file."""
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray(array if array.shape[-1] == 3 else array[..., 0]).save(buffer, "png")
    return buffer.getvalue()


def sound(wave: np.ndarray, rate: int, file_format: str) -> bytes:
    """float32 (samples,) as a 16-bit sound file ("wav", "flac" or "ogg").

    Raises ValueError for a sampling rate that such a file cannot have.
    """
    import soundfile

    buffer: IO[bytes] = io.BytesIO()
    try:
        soundfile.write(buffer, wave, rate, format=file_format)
    except soundfile.SoundFileError as error:
        raise ValueError(
            f"a {file_format} file cannot hold sound of {rate} Hz; write a .wav file"
        ) from error
    return buffer.getvalue()  # type: ignore[attr-defined]


def encoded(codec: Codec, raw: Any) -> bytes:
    """A raw sample as a file of ``SUFFIXES``: text in UTF-8, a PNG picture or a WAV."""
    if isinstance(codec, Image):
        return png(raw)
    return sound(raw, codec.rate, "wav") if isinstance(codec, Audio) else raw.encode()


def half_blocks(array: np.ndarray) -> str:
    """uint8 (H, W, C) in half blocks: two rows of pixels a line, 24-bit colour."""
    rgb = np.broadcast_to(array, (*array.shape[:2], 3))
    if len(rgb) % 2:
        rgb = np.concatenate([rgb, np.full_like(rgb[:1], 255)])
    lines = []
    for top, bottom in zip(rgb[::2], rgb[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(top, bottom, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)
