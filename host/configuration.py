"""Pipelines as Gadgetron writes them: found by name or path, read for the embedded host, overridden."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.settings import unknown
from quantitron.pipelines import pipeline_names, pipeline_text

EXTERNAL_MODULE = "quantitron.gadgets.chain"
"""What ``<execute name=...>`` must name for the embedded host to run it."""

NEEDS_GADGETRON = (
    "the embedded host runs only readers, writers and one <external>; this needs Gadgetron itself"
)


def load_pipeline(name: str) -> tuple[str, str]:
    """Text of a pipeline that comes with the package, or of an XML file.

    Args:
        name: such as ``subspace``, with or without ``.xml``; or a path.

    Returns:
        The XML text, and how errors call it.

    Raises:
        ScanError: if there is neither a pipeline nor a file of that name.
    """
    path = Path(name)
    if path.is_file() and (os.sep in name or path.suffix):
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ScanError(f"pipeline file {name} cannot be read ({error})") from error
    known = known_pipeline(name, ", or the path of an XML file")
    return pipeline_text(known), f"pipeline {known}"


def known_pipeline(name: str, besides: str = "") -> str:
    """``name`` without ``.xml``, if a pipeline of that name comes with the package.

    Args:
        name: such as ``subspace``.
        besides: what else may be given; ends the sentence of an error.

    Raises:
        ScanError: if there is none; the sentence names those that there are.
    """
    short = name.removesuffix(".xml")
    if short not in pipeline_names():
        names = ", ".join(pipeline_names())
        raise ScanError(f"there is no pipeline '{name}'; pipelines are: {names}{besides}")
    return short


def parse_pipeline(text: str, where: str) -> Element:
    """Root element of a pipeline.

    Raises:
        ScanError: if the text is not XML or its root is not ``<configuration>``.
    """
    try:
        root = ElementTree.fromstring(text.strip())
    except (ElementTree.ParseError, ValueError) as error:
        raise ScanError(f"{where}: the configuration is not XML ({error})") from None
    if root.tag != "configuration":
        raise ScanError(f"{where}: the root element is <{root.tag}>; {NEEDS_GADGETRON}")
    return root


def external_configuration(root: Element, where: str) -> Element:
    """The ``<configuration>`` that Gadgetron would hand to the external process.

    A bare ``<configuration>`` that lists gadgets is taken as it is.

    Raises:
        ScanError: if the pipeline holds anything that the embedded host cannot run.
    """
    if root.find("stream") is None and root.find("gadget") is not None:
        return root
    for node in root:
        if node.tag not in ("version", "readers", "writers", "stream"):
            raise ScanError(f"{where}: <{node.tag}> in <configuration>: {NEEDS_GADGETRON}")
    streams = root.findall("stream")
    nodes = [node for stream in streams for node in stream]
    if len(streams) != 1 or not nodes:
        raise ScanError(f"{where}: there must be one <stream> that holds one <external>")
    for node in nodes:
        if node.tag != "external":
            named = node.get("name") or node.findtext("name") or node.findtext("classname")
            called = f"<{node.tag}> ({named})" if named else f"<{node.tag}>"
            raise ScanError(f"{where}: {called} in <stream>: {NEEDS_GADGETRON}")
    if len(nodes) > 1:
        raise ScanError(f"{where}: {len(nodes)} <external> nodes: {NEEDS_GADGETRON}")
    execute = nodes[0].find("execute")
    if execute is not None and execute.get("name") != EXTERNAL_MODULE:
        module = execute.get("name")
        raise ScanError(f"{where}: <execute name='{module}'> is not {EXTERNAL_MODULE}: {NEEDS_GADGETRON}")
    configuration = nodes[0].find("configuration")
    if configuration is None:
        raise ScanError(f"{where}: <external> has no <configuration>")
    return configuration


def override(configuration: Element, settings: Iterable[str], where: str) -> None:
    """Put ``gadget.property=value`` settings into a ``<configuration>``, in place.

    Raises:
        ScanError: if a setting is not of that form or names a gadget that the pipeline does not have.
    """
    gadgets = {node.get("name", ""): node for node in configuration.findall("gadget")}
    for setting in settings:
        key, equals, value = setting.partition("=")
        gadget, dot, name = key.strip().partition(".")
        if not (equals and dot and gadget and name):
            raise ScanError(f"--set {setting}: write gadget.property=value, such as reconstruct.rank=15")
        if gadget not in gadgets:
            raise ScanError(unknown(gadget, gadgets, f"--set {setting}, {where}", "gadget"))
        set_property(gadgets[gadget], name, value)


def set_property(gadget: Element, name: str, value: str, replace: bool = True) -> None:
    """Give a ``<gadget>`` element a property; keep one that it has unless ``replace``."""
    for node in gadget.findall("property"):
        if node.get("name") == name:
            if replace:
                node.set("value", value)
            return
    ElementTree.SubElement(gadget, "property", name=name, value=value)
