"""The chain of gadgets that a ``<configuration>`` lists, and ``run``, the target of ``<execute>``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args, get_type_hints
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import ismrmrd
import yaml

from quantitron.gadgets import settings
from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.basis import BasisGadget
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget
from quantitron.gadgets.header import make_context, parse_header
from quantitron.gadgets.header_precision import single_precision
from quantitron.gadgets.images import Images
from quantitron.gadgets.prepare import CompressCoils, NoiseAdjust, RemoveOversampling
from quantitron.gadgets.reconstruct import Reconstruct
from quantitron.gadgets.sequence import SUPPORTED, detect_sequence
from quantitron.gadgets.wire import ERROR, PeerGone, Wire
from quantitron.pipelines import settings_names, settings_text

logger = logging.getLogger("quantitron")


GADGETS: tuple[type[Gadget], ...] = (
    NoiseAdjust,
    RemoveOversampling,
    CompressCoils,
    Accumulate,
    BasisGadget,
    Reconstruct,
    Images,
)
"""Every gadget, in the order in which data passes through them."""

Values = Mapping[str, Mapping[str, object]]
"""Gadget name -> property -> value."""


@dataclass(frozen=True)
class Chain:
    """Gadgets that are configured and prepared for one scan."""

    gadgets: tuple[Gadget, ...]
    context: Context

    def __call__(
        self, acquisitions: Iterable[ismrmrd.Acquisition | AcquisitionBlock]
    ) -> Iterator[ismrmrd.Image]:
        """Run the scan through all gadgets; images come as soon as they are ready.

        Raises:
            ScanError: where the scan cannot be processed. What went wrong without stopping the chain is in
                ``context.failures`` at the end.
        """
        items: Iterable[Any] = acquisitions
        for gadget in self.gadgets:
            items = _named(gadget, items, self.context)
        yield from items


def _named(gadget: Gadget, items: Iterable[Any], context: Context) -> Iterator[Any]:
    """Run a gadget; an exception that nobody foresaw is named after the gadget that raised it."""
    try:
        yield from gadget(items, context)
    except (ScanError, PeerGone):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise ScanError(f"{gadget.name} ran out of memory: {_first_line(error)}") from error
        raise GadgetFailed(
            f"{gadget.name} failed unexpectedly with {type(error).__name__}: {_first_line(error)}"
        ) from error


class GadgetFailed(ScanError):
    """A gadget raised something that is a mistake of this program rather than of the scan."""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


# -------------------------------------------------------------------------------------------- configuration


def make_chain(
    configuration: Element,
    header: str | bytes,
    where: str = "pipeline",
    gadgets: Sequence[type[Gadget]] | None = None,
) -> Chain:
    """Configure and prepare the gadgets that a ``<configuration>`` lists, for the scan that the header
    describes.

    Args:
        configuration: holds ``<gadget name="..."><property name="..." value="..."/></gadget>`` elements.
        header: the ISMRMRD header's XML.
        where: what errors in the configuration begin with.
        gadgets: the gadgets that can be named, in the order in which data passes; ``GADGETS`` if None.

    Raises:
        ScanError: for a wrong configuration, wrong settings, or a header that they cannot reconstruct;
        before any
            data is read.
    """
    classes, values = read_configuration(configuration, where, gadgets)
    method = _method(classes, values)
    layers = _settings_layers(method, classes, values, where)
    scan = single_precision(parse_header(header))
    # the sequence decides which section of the settings file holds, so it comes from the sections before
    general = _merged(layers[:1] + layers[-1:], "accumulate")
    sequence, _ = detect_sequence(scan, str(general.get("sequence", "auto")))
    chain = _build_layers(classes, layers, sequence)
    hashed: dict[str, dict[str, Any]] = {gadget.name: settings.resolved(gadget) for gadget in chain}
    accumulate: dict[str, Any] = hashed.get("accumulate", {})
    context = make_context(
        scan,
        **{key: accumulate[key] for key in ("sequence", "axes", "phase_sign") if key in accumulate},
        pipeline=method or "custom",
        settings_hash=settings.settings_hash(hashed),
    )
    context.seed = next((s["seed"] for s in hashed.values() if isinstance(s.get("seed"), int)), 0)
    for gadget in chain:
        gadget.prepare(context)
    for gadget in chain:
        gadget.make_ready(context)
    return Chain(chain, context)


def check_configuration(
    configuration: Element, where: str = "pipeline", gadgets: Sequence[type[Gadget]] | None = None
) -> dict[str, dict[str, dict[str, object]]]:
    """Check a configuration without a scan, for every sequence that its solver reconstructs.

    Returns:
        Sequence -> gadget -> property -> resolved value.

    Raises:
        ScanError: as ``make_chain``, as far as it can be told without a header.
    """
    classes, values = read_configuration(configuration, where, gadgets)
    layers = _settings_layers(_method(classes, values), classes, values, where)
    return {
        sequence: {
            gadget.name: settings.resolved(gadget) for gadget in _build_layers(classes, layers, sequence)
        }
        for sequence in SUPPORTED
        if _reconstructed(classes, values, sequence)
    }


def _reconstructed(classes: list[type[Gadget]], values: Values, sequence: str) -> bool:
    """Whether the solver of a configuration is for this sequence; one that does not exist is for all, so that
    making it says so."""
    for gadget in classes:
        told: Callable[[Mapping[str, object]], tuple[str, ...]] | None = getattr(gadget, "sequences_of", None)
        if told is not None and (sequences := told(values[gadget.name])) and sequence not in sequences:
            return False
    return True


def read_configuration(
    configuration: Element, where: str, gadgets: Sequence[type[Gadget]] | None = None
) -> tuple[list[type[Gadget]], dict[str, dict[str, object]]]:
    """The gadgets of a ``<configuration>`` in order, and their properties as written.

    Raises:
        ScanError: for anything that is not a gadget, an unknown or repeated name, or an order in which data
        cannot
            pass.
    """
    gadgets = GADGETS if gadgets is None else gadgets
    known = {gadget.name: gadget for gadget in gadgets}
    classes: list[type[Gadget]] = []
    values: dict[str, dict[str, object]] = {}
    for node in configuration:
        if not isinstance(node.tag, str):  # a comment
            continue
        if node.tag != "gadget":
            raise ScanError(f"{where}: <configuration> holds <{node.tag}>; only <gadget> is allowed")
        name = node.get("name")
        if name is None:
            raise ScanError(f"{where}: a <gadget> has no name")
        if name not in known:
            raise ScanError(settings.unknown(name, known, where, "gadget"))
        if name in values:
            raise ScanError(f"{where}: gadget '{name}' is listed twice")
        classes.append(known[name])
        values[name] = _properties(node, f"{where}, gadget {name}")
    _check_order(classes, list(gadgets), where)
    return classes, values


def _properties(node: Element, where: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for child in node:
        if not isinstance(child.tag, str):
            continue
        name, value = child.get("name"), child.get("value")
        if child.tag != "property" or name is None or value is None:
            raise ScanError(f"{where}: <{child.tag}> must be <property name=... value=.../>")
        if name in found:
            raise ScanError(f"{where}: property '{name}' is given twice")
        found[name] = value
    return found


def _check_order(classes: list[type[Gadget]], known: list[type[Gadget]], where: str) -> None:
    """Each gadget must take what the one before gives, in the order of ``GADGETS``, images at the end."""
    if not classes:
        raise ScanError(f"{where}: <configuration> lists no gadget")
    for before, after in pairwise(classes):
        if known.index(after) < known.index(before):
            raise ScanError(f"{where}: gadget '{after.name}' must come before '{before.name}'")
    flow: Any = AcquisitionBlock
    for gadget in classes:
        taken, given = _items(gadget)
        if Any not in (taken, flow) and taken != flow:
            missing = next((g.name for g in known if g not in classes and _items(g)[1] == taken), None)
            hint = f"; '{missing}' is missing before it" if missing else ""
            raise ScanError(f"{where}: gadget '{gadget.name}' takes {_kind(taken)}, not {_kind(flow)}{hint}")
        flow = given
    if flow is not Any and flow is not ismrmrd.Image:
        raise ScanError(
            f"{where}: the chain ends with gadget '{classes[-1].name}', giving {_kind(flow)}, no images"
        )


def _items(gadget: type[Gadget]) -> tuple[Any, Any]:
    """Types of the items that a gadget takes and gives, from the annotations of ``__call__``."""
    hints = get_type_hints(gadget.__call__)
    taken, given = (get_args(hints.get(name, Any)) for name in ("items", "return"))
    return (taken[0] if taken else Any), (given[0] if given else Any)


def _kind(item: Any) -> str:
    """Name of a kind of items; the first of several that may take turns."""
    return str((get_args(item) or (item,))[0].__name__)


def _method(classes: list[type[Gadget]], values: Values) -> str | None:
    """Name of the method: the solver that reconstruct runs. None in a chain without a solver."""
    for gadget in classes:
        if "solver" in values[gadget.name]:
            return str(values[gadget.name]["solver"]).strip()
        default = getattr(gadget, "solver", None)
        if isinstance(default, str):
            return default
    return None


Layer = tuple[str, str, Values]
"""Sequence (empty for all), what errors begin with, values."""


def _settings_layers(
    method: str | None, classes: list[type[Gadget]], values: dict[str, dict[str, object]], where: str
) -> list[Layer]:
    """Settings from weakest to strongest: the method's file (all, then each sequence), then the XML."""
    layers: list[Layer] = [("", "", {})]
    if method in settings_names():
        file = f"settings/{method}.yaml"
        sections = _read_yaml(settings_text(str(method)), file)
        if not isinstance(sections, dict):
            raise ScanError(f"{file}: must hold sections, such as 'all:'")
        allowed = ("all", *SUPPORTED)
        for section in sections:
            if section not in allowed:
                raise ScanError(settings.unknown(str(section), allowed, file, "section"))
        names = [gadget.name for gadget in classes]
        layers = []
        for section in allowed:
            content = sections.get(section) or {}
            here = f"{file}, section {section}"
            if not isinstance(content, dict) or not all(isinstance(v or {}, dict) for v in content.values()):
                raise ScanError(f"{here}: must hold gadget -> property -> value")
            for name in content:
                if name not in names:
                    raise ScanError(settings.unknown(str(name), names, here, "gadget"))
            layers.append(
                ("" if section == "all" else section, here, {k: v or {} for k, v in content.items()})
            )
    layers.append(("", where, values))
    return layers


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; by itself YAML drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of names to values."""
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"line {line} holds a key that is no name")
            if key.value in seen:
                raise ValueError(f"line {line} gives '{key.value}' a second time")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, file: str) -> object:
    """Content of a settings file; an empty mapping where it holds nothing.

    Raises:
        ScanError: if it is not YAML, or a key in it is no name or is given twice.
    """
    try:
        content = yaml.load(text, _EachKeyOnce)  # safe: a kind of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise ScanError(f"{file} is not YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ScanError(f"{file}: {error}") from None
    return {} if content is None else content


def _merged(layers: Iterable[Layer], gadget: str) -> dict[str, object]:
    merged: dict[str, object] = {}
    for _, _, values in layers:
        merged.update(values.get(gadget, {}))
    return merged


def _build_layers(classes: list[type[Gadget]], layers: list[Layer], sequence: str) -> tuple[Gadget, ...]:
    chain = []
    for gadget in classes:
        # the solver decides which other properties exist, so it goes with every layer
        xml = layers[-1][2][gadget.name]
        values: dict[str, object] = {"solver": xml["solver"]} if "solver" in xml else {}
        built: Gadget | None = None
        for only, where, layer in layers:
            # building after each layer lets an error name the file that it stands in
            if only in ("", sequence) and (gadget.name in layer):
                values.update(layer[gadget.name])
                built = _build(gadget, values, f"{where}, gadget {gadget.name}", sequence)
        chain.append(built if built is not None else _build(gadget, values, layers[-1][1], sequence))
    return tuple(chain)


def _build(gadget: type[Gadget], values: Mapping[str, object], where: str, sequence: str) -> Gadget:
    """A gadget may make itself from its settings and the sequence (``build``), where its properties depend on
    one another."""
    own: Callable[[Mapping[str, object], str, str], Gadget] | None = getattr(gadget, "build", None)
    return settings.build(gadget, values, where) if own is None else own(values, where, sequence)


# -------------------------------------------------------------------------------------------------- streams


def deliver(wire: Wire, open_chain: Callable[[], Chain], report: Callable[[str], None]) -> str | None:
    """Run one scan from a wire and send its images back on the same wire.

    All input is read to its end before a failure is reported, and what was computed before it is sent.

    Args:
        wire: stands before the first acquisition.
        open_chain: makes the chain; its errors are reported like all others.
        report: sends the sentence of a failure to the peer.

    Returns:
        None, or the sentence on what failed.
    """
    failures: list[str] = []
    sent = 0
    try:
        chain = open_chain()
        failures = chain.context.failures
        for image in chain(wire.blocks(chain.context.fail)):
            wire.send_image(image)
            sent += 1
        if not sent and not failures:
            failures.append("the chain ended without any image")
    except PeerGone as error:
        logger.error("%s; giving up after %d images", error, sent)
        return str(error)
    except Exception as error:
        foreseen = isinstance(error, ScanError) and not isinstance(error, GadgetFailed)
        logger.error("%s", error, exc_info=logger.isEnabledFor(logging.DEBUG) if foreseen else error)
        failures.append(_sentence(error))
    if failures:
        delivered = f" ({sent} images were delivered)" if sent else ""
        sentence = "; ".join(dict.fromkeys(failures)) + delivered
    try:
        wire.drain()
        if failures:
            report(sentence)
    except PeerGone as error:
        logger.error("%s; nobody is left to read the end of the scan", error)
        return sentence if failures else str(error)
    return sentence if failures else None


def _sentence(error: Exception) -> str:
    if isinstance(error, ScanError):
        return str(error)
    return f"the reconstruction failed unexpectedly with {type(error).__name__}: {_first_line(error)}"


def parse_configuration(text: str | bytes, where: str) -> Element:
    """XML text of a configuration.

    Raises:
        ScanError: if it is not XML.
    """
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ScanError(f"{where}: the configuration is not XML ({error})") from None


def run(connection: Any) -> None:
    """Target of ``<execute name="quantitron.gadgets.chain" target="run" type="python"/>``.

    Args:
        connection: ``gadgetron.external.Connection`` of Gadgetron's ``python -m gadgetron``; config and
        header have
            been read.

    Raises:
        SystemExit: with status 1, after a failure was reported.
    """
    wire = Wire(connection.socket.socket)
    where = "pipeline"
    say_close = connection.socket.close

    def close() -> None:
        """Gadgetron's package says CLOSE at the end, and fails with a traceback where nobody is left."""
        try:
            say_close()
        except OSError as error:
            logger.info("nobody is left to be told the end: %s", error.strerror)
            connection.socket.socket.close()

    connection.socket.close = close

    def open_chain() -> Chain:
        configuration = parse_configuration(connection.raw_bytes.config, where)
        return make_chain(configuration, connection.raw_bytes.header, where)

    def report(sentence: str) -> None:
        wire.send_text(ERROR, sentence)

    if deliver(wire, open_chain, report) is not None:
        raise SystemExit(1)
