"""Which layer gets which scheme: patterns, shapes, presets, and the defaults of each target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flightquant.client.presets import MIXTURES, PRESETS
from flightquant.client.sources import Source, TensorMeta
from flightquant.errors import InvalidRequestError, shown
from flightquant.reference import fits_groups, matrix_shape
from flightquant.reference.numeric import F32
from flightquant.schemes import SCHEMES, LayerSpec
from flightquant.spec import Command

KEPT_PATTERNS = ("*embed*", "*norm*", "*lm_head*", "*.wte.*", "*.wpe.*", "*.ln_*", "*.mlp.gate.*", "*.router.*")
"""Weights that stay as they are unless asked for, compared without regard to case: embeddings and norms are no linear
layers, and the output layer and the routers of expert models lose the most."""
GGUF_KEPT_PATTERNS = ("*norm*", "*.ffn_gate_inp.*", "*position_embd*", "*token_types*", "*.ssm_conv1d.*")
"""The same for GGUF, where llama.cpp quantizes the embedding and output matrices too."""
FUSED_MODULES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Modules of one parent that vLLM runs as one, and for which it takes one scale of the whole tensor (nvfp4)."""
TARGETS = ("compressed-tensors", "bitsandbytes", "gguf", "parquet", "arrow")
FOLDERS = ("compressed-tensors", "bitsandbytes")
"""Targets that are safetensors files or folders, whose loaders know linear layers alone."""

_PACKED = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight.absmax", ".qweight")
"""What stands beside or for a weight in the files that quantizers write."""
_OPTIONS = tuple(name for name in Command.__dataclass_fields__ if name not in ("op", "on_error", "metrics", "dtype"))
OPTION_KEYS = ("bit_width", "double_quant", *_OPTIONS)
"""Keys of a recipe, and of its rules, that say how a layer is quantized."""
_RULE_KEYS = ("match", "keep", "min_rows", "min_columns", "max_rows", "max_columns", *OPTION_KEYS)
_RECIPE_KEYS = ("preset", "target", "keep", "default_keep", "rules", "mixture", "activations", *OPTION_KEYS)


def module_of(name: str) -> str:
    """The module that a weight belongs to: its name without ``.weight``."""
    return name.removesuffix(".weight")


def fits(name: str, pattern: str) -> bool:
    """Whether a shell pattern fits a tensor's name or its module's, without regard to case."""
    lower = pattern.lower()
    return fnmatchcase(name.lower(), lower) or fnmatchcase(module_of(name).lower(), lower)


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done with the layers that fit: kept (``command`` is None), or quantized in another way.

    ``rows`` and ``columns`` are the smallest and largest extents that fit, both included.
    """

    patterns: tuple[str, ...]
    command: Command | None
    rows: tuple[int, int]
    columns: tuple[int, int]

    def applies(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the rule is this layer's."""
        rows, cols = matrix_shape(shape)
        in_size = self.rows[0] <= rows <= self.rows[1] and self.columns[0] <= cols <= self.columns[1]
        return in_size and any(fits(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantized; the first rule that fits a layer decides, then the target's defaults.

    Attributes
    ----------
    command : Command
        For every layer that no rule is about.
    target : str or None
        One of :data:`TARGETS`; None: told from the output's name and the scheme.
    keep : tuple of str
        Shell patterns of layers that stay as they are; they come before the rules.
    default_keep : bool
        Whether :data:`KEPT_PATTERNS` hold.
    mixture : str or None
        llama.cpp's own choice of types, such as ``"q4_k_m"``.
    activations : str or None
        ``"dynamic"``: the loader quantizes the activations too, each token by itself, to the weights' own type.
    """

    command: Command
    target: str | None = None
    keep: tuple[str, ...] = ()
    default_keep: bool = True
    rules: tuple[Rule, ...] = ()
    mixture: str | None = None
    activations: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Recipe:
        """A recipe from what a YAML or JSON file holds.

        Raises
        ------
        InvalidRequestError
            An unknown key or value; the message names it and what is allowed.
        """
        _check_keys(given, _RECIPE_KEYS, "the recipe")
        if "preset" in given:
            given = {**preset(given["preset"]), **{key: value for key, value in given.items() if key != "preset"}}
        options = {key: value for key, value in given.items() if key in OPTION_KEYS}
        if "scheme" not in options and "bit_width" not in options:
            raise InvalidRequestError(
                'the recipe has no "scheme", which layers get that no rule is about; expected one such as int4, or a '
                f'"preset": {", ".join(available_presets())}',
                field="scheme",
            )
        command = Command.build(**options)
        target = _one_of(given, "target", TARGETS)
        rules = given.get("rules", [])
        if not isinstance(rules, list):
            raise _wrong("rules", rules, "a list of rules")
        return cls(
            command=command,
            target=target,
            keep=_patterns(given, "keep"),
            default_keep=_typed(given, "default_keep", bool, True),
            rules=tuple(_rule(rule, options) for rule in rules),
            mixture=_one_of(given, "mixture", tuple(MIXTURES)),
            activations=_one_of(given, "activations", ("dynamic",)),
        )

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """A recipe from a YAML or JSON file.

        Raises
        ------
        InvalidRequestError
            It is neither, or no recipe.
        """
        return cls.parse(read_recipe(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds; the values are not looked at yet.

    Raises
    ------
    InvalidRequestError
        It is not an object in JSON or YAML.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    problem = ""
    try:
        if path.suffix == ".json":
            parsed = json.loads(text)
        else:
            import yaml

            try:
                parsed = yaml.safe_load(text)
            except yaml.YAMLError as error:
                parsed, problem = None, f": {' '.join(str(error).split())[:200]}"
    except (ValueError, RecursionError) as error:
        parsed, problem = None, f": {error}"
    if not isinstance(parsed, dict):
        raise InvalidRequestError(f"{path.name} is no recipe{problem}; expected keys such as scheme, keep and rules")
    return {str(key): value for key, value in parsed.items()}


def preset(name: Any) -> dict[str, Any]:
    """A preset's keys.

    Raises
    ------
    InvalidRequestError
        There is none of this name.
    """
    known = available_presets()
    if not isinstance(name, str) or name not in known:
        raise InvalidRequestError(
            f"unknown preset {shown(name)}; expected one of {', '.join(known)}",
            field="preset",
            got=name,
            expected=tuple(known),
        )
    return known[name]


def available_presets() -> dict[str, dict[str, Any]]:
    """The presets whose schemes this version has."""
    return {name: dict(keys) for name, keys in PRESETS.items() if keys["scheme"] in SCHEMES}


def _check_keys(given: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    for key in given:
        if key not in allowed:
            raise InvalidRequestError(
                f'unknown key "{str(key)[:80]}" in {what}; expected one of {", ".join(allowed)}',
                field=str(key),
                got=key,
                expected=tuple(allowed),
            )


def _wrong(key: str, got: Any, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f'"{key}" in the recipe is {shown(got)}; expected {expected}', field=key, got=got)


def _typed(given: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = given.get(key, default)
    if type(value) is not kind:
        raise _wrong(key, value, {bool: "true or false", int: "an integer"}[kind])
    return value


def _one_of(given: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str | None:
    value = given.get(key)
    if value is not None and value not in allowed:
        raise _wrong(key, value, f"one of {', '.join(allowed)}")
    return value


def _patterns(given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = given.get(key, ())
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(each, str) and each.strip() for each in listed):
        raise _wrong(key, value, "a pattern, several with commas between them, or a list of patterns")
    return tuple(each.strip() for each in listed)


def _rule(given: Any, options: Mapping[str, Any]) -> Rule:
    if not isinstance(given, Mapping):
        raise _wrong("rules", given, 'rules such as {"match": "*.down_proj", "scheme": "int8"}')
    _check_keys(given, _RULE_KEYS, "a rule of the recipe")
    patterns = _patterns(given, "match")
    if not patterns:
        raise _wrong("match", given, "patterns of layers")
    changed = {key: value for key, value in given.items() if key in OPTION_KEYS}
    keep = _typed(given, "keep", bool, False)
    if keep and changed:
        raise InvalidRequestError(f'the rule for "{patterns[0]}" keeps its layers and has a {min(changed)} as well')
    base = {} if "scheme" in changed or "bit_width" in changed else options
    command = None if keep else Command.build(**{**base, **changed})
    limit = 1 << 62
    sizes = [_typed(given, key, int, default) for key, default in
             (("min_rows", 0), ("max_rows", limit), ("min_columns", 0), ("max_columns", limit))]  # fmt: skip
    return Rule(patterns, command, (sizes[0], sizes[1]), (sizes[2], sizes[3]))


@dataclass(slots=True)
class Plan:
    """What becomes of every tensor of a source.

    Attributes
    ----------
    target : str
    commands : dict of str to Command
        The layers that are quantized, in the source's order.
    kept : dict of str to str
        The tensors that stay as they are, each with the reason.
    recipe : Recipe
    importance : dict of str to float32 array
        What errors in each column count, of layers that are given such numbers.
    """

    target: str
    recipe: Recipe
    commands: dict[str, Command] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    importance: dict[str, F32] = field(default_factory=dict)

    def groups(self, names: Sequence[str]) -> dict[Command, list[str]]:
        """Layers by their command, each group in order."""
        grouped: dict[Command, list[str]] = {}
        for name in names:
            grouped.setdefault(self.commands[name], []).append(name)
        return grouped

    def fused(self) -> list[list[str]]:
        """Layers that need one scale of the whole tensor together, see :data:`FUSED_MODULES`."""
        found: dict[tuple[str, int, Command], list[str]] = {}
        for name, command in self.commands.items():
            parent, _, last = module_of(name).rpartition(".")
            place = next((i for i, together in enumerate(FUSED_MODULES) if last in together), None)
            if place is not None and command.layer_spec().scheme.whole_scale:
                found.setdefault((parent, place, command), []).append(name)
        return [names for names in found.values() if len(names) > 1]

    def spec(self, name: str) -> LayerSpec:
        """How a layer is quantized, with every default filled in."""
        return self.commands[name].layer_spec()


def kept_modules(plan: Plan, tensors: Mapping[str, TensorMeta]) -> list[str]:
    """The modules with a matrix that stays as it is, which a loader must not take for quantized ones."""
    return sorted(module_of(name) for name in plan.kept if name.endswith(".weight") and len(tensors[name].shape) == 2)


def make_plan(source: Source, recipe: Recipe, target: str) -> Plan:
    """Decide for every tensor.

    Raises
    ------
    InvalidRequestError
        A pattern fits no tensor (most likely it is misspelt, and the layer would be quantized in silence), the source
        is quantized already, or nothing can be quantized.
    """
    packed = next((name for name in source.tensors if name.endswith(_PACKED)), None)
    if packed is not None:
        raise InvalidRequestError(f'{source.label} is quantized already: it has a "{packed}"', field="model")
    for pattern in (*recipe.keep, *(pattern for rule in recipe.rules for pattern in rule.patterns)):
        if not any(fits(name, pattern) for name in source.tensors):
            raise InvalidRequestError(f'no tensor fits the pattern "{pattern}"', field="keep", got=pattern)
    plan = Plan(target, recipe)
    mixed: dict[str, str] = {}
    if recipe.mixture:
        shapes = {name: meta.shape for name, meta in source.tensors.items()}
        mixed = MIXTURES[recipe.mixture](shapes, source.metadata.get("general.architecture", ""))
    for name, meta in source.tensors.items():
        command, reason = _decide(source, name, meta, recipe, target)
        if command is recipe.command and name in mixed:
            command = Command.build(scheme=mixed[name])
        if command is not None:
            spec = command.layer_spec()
            if target == "gguf" and command.packing is None and "gguf" in spec.scheme.packings[1:]:
                command = replace(command, packing="gguf")
                spec = command.layer_spec()
            if fits_groups(spec, meta.shape[-1]):
                plan.commands[name] = command
                continue
            reason = f"group size {spec.group_size} does not divide {meta.shape[-1]} columns"
        plan.kept[name] = reason
    if not plan.commands:
        names = " named *.weight" if target in FOLDERS else ""
        raise InvalidRequestError(
            f"{source.label} has no tensor to quantize; expected two-dimensional float tensors{names}", field="model"
        )
    return plan


def _decide(source: Source, name: str, meta: TensorMeta, recipe: Recipe, target: str) -> tuple[Command | None, str]:
    kept = next((pattern for pattern in recipe.keep if fits(name, pattern)), None)
    if kept is not None:
        return None, f"--keep {kept}"
    reason = _cannot(name, meta, target)
    if reason:
        return None, reason
    rule = next((rule for rule in recipe.rules if rule.applies(name, meta.shape)), None)
    if rule is not None and rule.command is None:
        return None, "kept by a rule"
    patterns = GGUF_KEPT_PATTERNS if target == "gguf" else KEPT_PATTERNS
    usual = next((pattern for pattern in patterns if fits(f".{name}", pattern)), None)
    if rule is None and recipe.default_keep and usual is not None:
        return None, f"kept by default ({usual})"
    if meta.dtype.startswith("F8_"):
        raise InvalidRequestError(
            f'"{name}" of {source.label} is of 8-bit floats ({meta.dtype}): the checkpoint is quantized already; '
            "start from its bfloat16 original, or leave such layers alone with --keep",
            field="model",
        )
    if not meta.is_float:
        return None, f"dtype {meta.dtype}"
    command = rule.command if rule is not None and rule.command is not None else recipe.command
    return command, ""


def _cannot(name: str, meta: TensorMeta, target: str) -> str:
    """Why a target's loaders could not use a quantized tensor of this name and shape; empty if they can."""
    if target in FOLDERS and not name.endswith(".weight"):
        return "not named *.weight"
    good = len(meta.shape) == 2 if target in FOLDERS else len(meta.shape) >= 2
    return "" if good and 0 not in meta.shape else f"shape {list(meta.shape)}"
