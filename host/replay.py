"""``quantitron replay``: a raw file through a pipeline, here or on a Gadgetron, into a map file."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import ismrmrd

from quantitron.gadgets.acquisition_kind import NOISE, flagged, runs
from quantitron.gadgets.chain import make_chain
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import read_images, write_images
from quantitron.gadgets.image_metadata import notes_of
from quantitron.gadgets.output_file import check_no_input
from quantitron.gadgets.unfinished_file import abandoned_files, discard, unfinished_file
from quantitron.gadgets.uninterrupted import uninterrupted
from quantitron.host.client import parse_address, send_scan
from quantitron.host.configuration import (
    external_configuration,
    load_pipeline,
    override,
    parse_pipeline,
    set_property,
)
from quantitron.host.raw_file import count_acquisitions, read_blocks, read_header, read_noise

logger = logging.getLogger("quantitron")

LEAST_SPACE = 16 << 20
"""Free bytes below which writing maps is not even begun."""


@dataclass
class Replayed:
    """What came of a replay."""

    output: Path
    """The map file."""
    images: int = 0
    """Images written."""
    series: dict[int, str] = field(default_factory=dict)
    """Series index -> data role of its images."""
    notes: list[str] = field(default_factory=list)
    """What was assumed about the scan."""
    seconds: float = 0.0
    """Wall-clock time."""


def replay(
    raw: str | os.PathLike[str],
    pipeline: str,
    output: str | os.PathLike[str],
    settings: Sequence[str] = (),
    overwrite: bool = False,
    gadgetron: str | None = None,
    group: str = "dataset",
    progress: Callable[[int, int], None] | None = None,
    noise: str | os.PathLike[str] | None = None,
) -> Replayed:
    """Reconstruct a raw file.

    Args:
        raw: ISMRMRD raw file.
        pipeline: name of a pipeline, or path of an XML file.
        output: map file to write, in the layout of Gadgetron's client.
        settings: ``gadget.property=value``, stronger than the pipeline's.
        overwrite: replace an output that exists, unless it is a file that the replay reads.
        gadgetron: ``HOST:PORT`` of a Gadgetron (or ``quantitron serve``) that reconstructs instead.
        group: group of the raw file.
        progress: told the acquisitions read and their total.
        noise: raw file (group ``dataset``) whose noise lines take the place of the scan's own.

    Raises:
        ScanError: if anything fails. What was computed before is in the output nevertheless, and the
        sentence says
            so.
    """
    started = time.monotonic()
    target = Path(output)
    check_no_input(target, raw, pipeline, *(() if noise is None else (noise,)))
    _check_output(target, overwrite)
    header = read_header(raw, group)
    total = count_acquisitions(raw, group)
    noise_lines = None if noise is None else read_noise(noise)
    text, where = load_pipeline(pipeline)
    root = parse_pipeline(text, where)
    configuration = external_configuration(root, where)
    override(configuration, settings, where)
    check_no_input(target, *(node.get("value", "") for node in configuration.iter("property")))
    for node in configuration.findall("gadget"):
        if node.get("name") == "images":  # consoles want codes, files want values
            set_property(node, "output", "float32", replace=False)
    result = Replayed(target)

    def blocks() -> Iterator[object]:
        done = 0
        yield from noise_lines or ()
        for block in read_blocks(raw, group):
            done += len(block)
            yield from (block,) if noise_lines is None else runs(block, ~flagged(block, NOISE))
            if progress is not None:
                progress(done, total)

    if gadgetron is not None:
        images = _remote(gadgetron, root, header, blocks(), result)
    else:
        images = _local(configuration, header, blocks(), where, settings, result)
    _write(images, target, result)
    result.seconds = time.monotonic() - started
    return result


def _local(
    configuration: Element,
    header: bytes,
    blocks: Iterator[object],
    where: str,
    settings: Sequence[str],
    result: Replayed,
) -> Iterator[ismrmrd.Image]:
    named = f"{where} with {', '.join(f'--set {setting}' for setting in settings)}" if settings else where
    chain = make_chain(configuration, header, named)
    try:
        yield from chain(_until_damaged(blocks, chain.context.fail))  # type: ignore[arg-type]
    except ScanError as error:  # often for want of what the failures before it cost
        raise ScanError("; ".join(dict.fromkeys([*chain.context.failures, str(error)]))) from error
    result.notes = list(chain.context.notes)
    if chain.context.failures:
        raise ScanError("; ".join(dict.fromkeys(chain.context.failures)))


def _until_damaged(blocks: Iterator[object], fail: Callable[[str], None]) -> Iterator[object]:
    """Blocks up to where the file is damaged: what came before may be enough for maps."""
    try:
        yield from blocks
    except ScanError as error:
        fail(str(error))


def _remote(
    gadgetron: str, root: Element, header: bytes, blocks: Iterator[object], result: Replayed
) -> Iterator[ismrmrd.Image]:
    """Images of another process; what it noted about the scan is in them, and its own log is far away."""
    text = ElementTree.tostring(root, encoding="unicode")
    for image in send_scan(parse_address(gadgetron), text, header, blocks):  # type: ignore[arg-type]
        for note in notes_of(image.attribute_string):
            if note not in result.notes:
                result.notes.append(note)
                logger.warning("%s", note)
        yield image


def _check_output(target: Path, overwrite: bool) -> None:
    """Everything about the output that can be told before the work."""
    if target.exists():
        if not overwrite:
            raise ScanError(f"{target} exists already (--overwrite replaces it)")
        if not target.is_file():
            raise ScanError(f"{target} is not a regular file and cannot be replaced")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise ScanError(f"the folder {folder} of the output does not exist")
    if not os.access(folder, os.W_OK):
        raise ScanError(f"the folder {folder} of the output may not be written to")
    free = shutil.disk_usage(folder).free
    if free < LEAST_SPACE:
        raise ScanError(f"the disk of {folder} is full ({free / 1e6:.1f} MB free)")


def _write(images: Iterable[ismrmrd.Image], target: Path, result: Replayed) -> None:
    """Write images beside the target and move them there at the end: a reader never sees half a file.

    After a failure the images that were written are kept under the target's name; so they are where somebody
    stops the replay.
    """
    partial = unfinished_file(target)
    abandoned = abandoned_files(target)
    for path in abandoned:
        logger.info("%s is of a replay that was killed; it is removed when this one is done", path)

    def counted() -> Iterator[ismrmrd.Image]:
        for image in images:
            role = str(image.meta.get("GADGETRON_DataRole", ""))
            result.series.setdefault(int(image.image_series_index), role)
            yield image

    failure: BaseException | None = None
    try:
        result.images = write_images(partial, None, counted())
    except BaseException as error:  # Ctrl-C and SIGTERM are none of Exception
        failure = error
    if failure is None and not result.images:
        failure = ScanError("the pipeline ended without any image")
    if failure is None:
        with uninterrupted():
            partial.replace(target)
            for path in abandoned:
                discard(path)
        return
    with uninterrupted():
        kept = _keep(partial, target)
    sentence = str(failure).replace(str(partial), str(target))
    where = f"{kept} images that were finished before are in {target}"
    if not isinstance(failure, ScanError):
        if kept:
            logger.error("%s", where)
        raise failure
    if kept:
        sentence += f" ({where})"
    raise ScanError(sentence) from failure


def _keep(partial: Path, target: Path) -> int:
    """Move what can still be read of an unfinished file to the target; returns the number of images."""
    try:
        kept = len(read_images(partial))
    except (ScanError, OSError) as error:
        logger.debug("nothing to keep: %s", error)
        kept = 0
    if kept:
        partial.replace(target)
    else:
        partial.unlink(missing_ok=True)
    return kept
