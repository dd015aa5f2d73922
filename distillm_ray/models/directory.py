"""What a model directory holds, and whether a teacher and a student fit together.

The command line runs these checks before it starts anything. They read JSON, safetensors headers
and the tokenizer, but no weights. transformers is imported for the tokenizer only, after everything
else was found to be right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from distillm_ray.config import Config, RemotePath, TargetsConfig, TeacherConfig
from distillm_ray.errors import ConfigError, ModelError
from distillm_ray.models.logit_rules import LogitRule, logit_rule
from distillm_ray.models.quantization import check_quantization
from distillm_ray.models.safetensors_files import TensorInfo, read_tensors
from distillm_ray.remote.inputs import fetched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role: TypeAlias = Literal["teacher", "student", "model"]  # model: what --model names

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight")
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "context_length",
    "model_max_length",
)
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers_block_type")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFacts:
    """What a run needs to know about a model before loading it."""

    path: Path
    source: Path | RemotePath  # as the config names it: other nodes fetch it from there
    role: Role
    config: Mapping[str, Any] = field(repr=False)  # config.json
    architecture: str
    num_parameters: int  # as stored: tied weights count once
    num_layers: int
    layers_key: str  # the config's key for num_layers
    hidden_size: int
    num_rows: int  # of the output head: the config's vocab_size, with padding
    vocabulary_size: int  # ids that have a token and a row; head rows from here on are padding
    context_length: int | None  # in tokens; None: the config has no limit
    tied: bool  # the output head is the input embedding
    head_rule: LogitRule  # from the head's matrix product to logits
    end_token_ids: tuple[int, ...]  # named by the directory, ascending
    has_chat_template: bool
    tokenizer_fingerprint: str  # equal for equal id-to-token tables
    tokens: Mapping[int, str] = field(repr=False)  # by id, those without a row included
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    def ends(self, end_token_id: int) -> tuple[int, ...]:
        """All ids that end a response: `end_token_id`, which the data's template trains, first."""
        return tuple(dict.fromkeys((end_token_id, *self.end_token_ids)))


def check_model_directory(
    source: Path | RemotePath, role: Role, *, trust_remote_code: bool = False
) -> ModelFacts:
    """Read the facts of a Hugging Face directory.

    Raises:
        StoreError: it cannot be fetched.
        ModelError: it is not a directory; config, weights or tokenizer are missing or damaged;
            the weights are pickles only; the model has custom code that is not trusted; it is not
            a causal language model; or its head rule is unknown.
    """
    path = fetched(source)
    if not path.exists():
        raise ModelError(f"{key_of(role)}: {path} does not exist")
    if not path.is_dir():
        raise ModelError(f"{key_of(role)}: {path} must be a Hugging Face directory, got a file")
    config = _read_json(path / "config.json", role)
    architecture = _check_architecture(config, path, role)
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(
            f"{key_of(role)}: {path} has custom code (auto_map in config.json), which would run"
            f" on every machine of the job; set {_section(role)}.trust_remote_code=true if you"
            " trust it"
        )
    if role != "model":
        use = "train" if role == "student" else "run"
        check_quantization(config, path, key=key_of(role), use=use)
    tensors = _read_weights(path, role)
    try:
        head_rule = logit_rule(config)
    except ModelError as error:
        raise ModelError(f"{key_of(role)}: {path}: {error}") from error
    _, num_rows = _number(config, ("vocab_size",), path, role)
    layers_key, num_layers = _number(config, _LAYER_KEYS, path, role)
    tokenizer = _read_tokenizer(path, role, trust_remote_code=trust_remote_code)
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    return ModelFacts(
        path=path,
        source=source,
        role=role,
        config=config,
        architecture=architecture,
        num_parameters=sum(tensor.num_elements for tensor in tensors.values()),
        num_layers=num_layers,
        layers_key=layers_key,
        hidden_size=_number(config, _HIDDEN_KEYS, path, role)[1],
        num_rows=num_rows,
        # A tokenizer may have ids beyond the rows, such as placeholders of images. Data that
        # contain such an id are refused when they are rendered.
        vocabulary_size=min(max(tokens) + 1, num_rows),
        context_length=next((config[key] for key in _CONTEXT_KEYS if config.get(key)), None),
        tied=_is_tied(config, tensors),
        head_rule=head_rule,
        end_token_ids=_end_token_ids(path, config, tokenizer, num_rows, role),
        has_chat_template=_has_chat_template(path, role),
        tokenizer_fingerprint=_fingerprint(tokens),
        tokens=tokens,
        tensors=tensors,
    )


def check_pair(teacher: ModelFacts, student: ModelFacts) -> int:
    """Return the size of the shared vocabulary: the ids for which both models have rows.

    Raises:
        ModelError: an id stands for different tokens, or only one of the two has it.
    """
    if teacher.tokenizer_fingerprint == student.tokenizer_fingerprint:
        return min(teacher.vocabulary_size, student.vocabulary_size)
    num_rows = max(teacher.num_rows, student.num_rows)
    for index in sorted(teacher.tokens.keys() | student.tokens.keys()):
        if index >= num_rows:
            break
        ours, theirs = student.tokens.get(index), teacher.tokens.get(index)
        if ours == theirs:
            continue
        texts = [
            f"{token!r} for the {facts.role} ({facts.path})"
            if token is not None
            else f"no token for the {facts.role} ({facts.path})"
            for token, facts in ((theirs, teacher), (ours, student))
        ]
        raise ModelError(
            f"teacher and student must share a vocabulary: id {index} is {' and '.join(texts)};"
            " their distributions cannot be compared id by id"
        )
    return min(teacher.vocabulary_size, student.vocabulary_size)


def check_lengths(config: Config, teacher: ModelFacts | None, student: ModelFacts) -> None:
    """Check that the longest sequence of the run fits into the context of both models.

    Raises:
        ConfigError: it does not; names the model and the keys to lower.
    """
    for facts in (teacher, student):
        if facts is not None:
            check_context(config.data.max_prompt_tokens, config.longest_response, facts)


def check_context(max_prompt_tokens: int, longest_response: int, facts: ModelFacts) -> None:
    """The longest prompt with the longest response must fit the model's context.

    Raises:
        ConfigError: it does not; names the model and the keys to lower.
    """
    longest = max_prompt_tokens + longest_response
    if facts.context_length is not None and longest > facts.context_length:
        raise ConfigError(
            f"data.max_prompt_tokens + the longest response must fit the {facts.role}'s context,"
            f" got {max_prompt_tokens} + {longest_response} = {longest} >"
            f" {facts.context_length} ({facts.path}): the model has no more positions; lower"
            " data.max_prompt_tokens, data.max_response_tokens, or sampling.max_tokens of rollout,"
            " evaluation or generate"
        )


def check_parallelism(teacher: TeacherConfig) -> None:
    """Check that scorers support the parallelism.

    Raises:
        ConfigError: tensor parallelism above 1.
    """
    if teacher.tensor_parallel > 1:
        raise ConfigError(
            f"teacher.tensor_parallel must be 1, got {teacher.tensor_parallel}: a scorer runs on"
            " one device; raise teacher.actors for more throughput"
        )


def check_targets(targets: TargetsConfig, vocabulary_size: int) -> None:
    """Check that top-k targets ask for no more ids than the vocabulary has.

    Raises:
        ConfigError: `targets.k` is above the vocabulary's size.
    """
    if targets.type == "top_k" and targets.k > vocabulary_size:
        raise ConfigError(
            f"targets.k must be at most the vocabulary's size, got {targets.k} >"
            f" {vocabulary_size}; lower it or use targets.type=logits"
        )


# ---- names in messages --------------------------------------------------------------------------


def key_of(role: Role) -> str:
    """The config key or command-line option that names the model."""
    return "--model" if role == "model" else f"{role}.model"


def _section(role: Role) -> str:
    """The config section whose `trust_remote_code` applies."""
    return "student" if role == "model" else role


# ---- config -------------------------------------------------------------------------------------


def _read_json(path: Path, role: Role) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{key_of(role)}: {path.parent} has no {path.name}: it is not a Hugging Face directory"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{key_of(role)}: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{key_of(role)}: {path} must hold an object")
    return content


def _check_architecture(config: Mapping[str, Any], path: Path, role: Role) -> str:
    architectures = config.get("architectures") or []
    causal = [
        name for name in architectures if name.endswith("ForCausalLM") or name == "GPT2LMHeadModel"
    ]
    if config.get("is_encoder_decoder") or not causal:
        raise ModelError(
            f"{key_of(role)}: {path} must be a decoder-only language model, got architectures"
            f" {architectures}"
        )
    return causal[0]


def _number(
    config: Mapping[str, Any], keys: tuple[str, ...], path: Path, role: Role
) -> tuple[str, int]:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int):
            return key, value
        if isinstance(value, list):  # the types of all layers, as in Nemotron-H
            return key, len(value)
    raise ModelError(f"{key_of(role)}: {path / 'config.json'} lacks {' or '.join(keys)}")


def _is_tied(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bool:
    # A config omits the key where it equals its class's default; then the weights decide.
    tied = config.get("tie_word_embeddings")
    return tied if isinstance(tied, bool) else not any(n.endswith(_HEAD_NAMES) for n in tensors)


# ---- weights ------------------------------------------------------------------------------------


def _read_weights(path: Path, role: Role) -> dict[str, TensorInfo]:
    index_path = path / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = _read_json(index_path, role).get("weight_map", {})
        names = weight_map.values() if isinstance(weight_map, dict) else [None]
        if not weight_map or not all(isinstance(name, str) for name in names):
            raise ModelError(
                f"{key_of(role)}: weight_map of {index_path} must name a file for each tensor"
            )
        if (path / "model.safetensors").is_file() and "model.safetensors" not in names:
            raise ModelError(
                f"{key_of(role)}: {path} holds model.safetensors and {index_path.name} with other"
                " files: transformers reads the one, vLLM the others; remove what is outdated"
            )
        shards = sorted({path / name for name in weight_map.values()})
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ModelError(
                f"{key_of(role)}: {path} lacks {', '.join(missing)}, which {index_path.name} names"
            )
    else:
        # Other files beside it, such as Mistral's consolidated.safetensors, hold the same again.
        shards = [file for file in (path / "model.safetensors",) if file.is_file()]
    if not shards:
        others = sorted(file.name for file in path.glob("*.safetensors"))
        if others:
            raise ModelError(
                f"{key_of(role)}: {path} must hold model.safetensors, or"
                f" {index_path.name} with the names of its shards, got only {', '.join(others)}:"
                " an incomplete download, or files under other names"
            )
        pickles = sorted(item.name for pattern in _PICKLES for item in path.glob(pattern))
        if pickles:
            raise ModelError(
                f"{key_of(role)}: {path} holds its weights as pickles only ({', '.join(pickles)}),"
                " which can run any code when they are loaded; save them as safetensors"
            )
        raise ModelError(f"{key_of(role)}: {path} has no weights: no *.safetensors file in it")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        found = read_tensors(shard)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ModelError(
                f"{key_of(role)}: {path} holds {twice[0]} in two files, of which one would win"
            )
        tensors.update(found)
    return tensors


# ---- tokenizer ----------------------------------------------------------------------------------


def _read_tokenizer(path: Path, role: Role, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from distillm_ray.models.tokenizers import load_tokenizer  # noqa: PLC0415 (seconds)

    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(
            f"{key_of(role)}: {path} has no tokenizer.json; load its tokenizer with transformers'"
            " AutoTokenizer and save it there with save_pretrained"
        )
    content = file.read_text(encoding="utf-8")
    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        raise ModelError(f"{key_of(role)}: {file} is not valid JSON: {error}") from error
    try:
        return load_tokenizer(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for bad content
        raise ModelError(
            f"{key_of(role)}: the tokenizer of {path} cannot be loaded: {error}"
        ) from error


def _fingerprint(tokens: Mapping[int, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for index in sorted(tokens):
        digest.update(f"{index}\0{tokens[index]}\0".encode())
    return digest.hexdigest()


def _end_token_ids(
    path: Path,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    role: Role,
) -> tuple[int, ...]:
    generation = path / "generation_config.json"
    named = _read_json(generation, role).get("eos_token_id") if generation.is_file() else None
    if named is None:
        named = config.get("eos_token_id")
    given = named if isinstance(named, list) else [] if named is None else [named]
    if any(isinstance(index, bool) or not isinstance(index, int) for index in given):
        raise ModelError(
            f"{key_of(role)}: eos_token_id of {path} must be an id or a list of ids, got {named!r};"
            " correct generation_config.json or config.json"
        )
    ids: set[int] = set(given)
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    beyond = sorted(index for index in ids if not 0 <= index < num_rows)
    ids -= set(beyond)
    if beyond and not ids:
        raise ModelError(
            f"{key_of(role)}: the end tokens {beyond} of {path} must be below the model's"
            f" {num_rows} rows: the model cannot generate them, and no response would ever end"
        )
    if not ids:
        raise ModelError(
            f"{key_of(role)}: {path} has no end token (eos_token_id in generation_config.json or"
            " config.json): no response would ever end"
        )
    return tuple(sorted(ids))


def _has_chat_template(path: Path, role: Role) -> bool:
    if (path / "chat_template.jinja").is_file():
        return True
    settings = path / "tokenizer_config.json"
    return settings.is_file() and bool(_read_json(settings, role).get("chat_template"))
