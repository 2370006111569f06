"""The HTTP API's description in OpenAPI 3.1: one table of endpoints, and a document made of it.

`ENDPOINTS` has a row for each path: the shapes of what it takes and gives, and the exceptions that it may end in.
The document is made of the shapes themselves (Pydantic models and msgspec Structs), of the notes that stand below
their fields in the source, and of `quire.errors.TABLE`. A path that the router serves without a row here,
or the reverse, fails a test.

A request's schema has the fields that are honoured, and those without effect, which say so; a field that is
refused by name is in none, as no unknown one is. OpenAPI 3.1 has no word for the events of a stream: the schema at
the media type `text/event-stream` is that of one event, its `data` the JSON of a shape; 3.2 writes `itemSchema`.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from typing import Any, Final, get_args, get_type_hints

import msgspec
from pydantic import BaseModel, TypeAdapter

from quire import errors
from quire.errors import TABLE, Row
from quire.router.metrics import CONTENT_TYPE
from quire.text import errors as text
from quire_schemas.anthropic import (
    MESSAGES_REFUSED,
    MESSAGES_WITHOUT_EFFECT,
    CountRequest,
    ListModels,
    MessagesAnswer,
    MessagesError,
    MessagesEvent,
    MessagesParameters,
    MessagesRequest,
    ModelInfo,
    ModelPage,
    TokenCount,
)
from quire_schemas.health import Health, Liveness, Readiness
from quire_schemas.openai.answer import ErrorBody
from quire_schemas.openai.batches import BatchList, BatchObject, CreateBatch, ListBatches
from quire_schemas.openai.body import IDLE, OF_CALLERS, WITHOUT_EFFECT, Refusal
from quire_schemas.openai.chat import CHAT_REFUSED, ChatChunk, ChatCompletion, ChatRequest
from quire_schemas.openai.completions import COMPLETION_REFUSED, Completion, CompletionRequest
from quire_schemas.openai.embeddings import EMBEDDING_REFUSED, EmbeddingList, EmbeddingRequest
from quire_schemas.openai.files import FileDeleted, FileList, FileObject, ListFiles, UploadForm
from quire_schemas.openai.models import ModelCard, ModelList
from quire_schemas.openai.responses import (
    RESPONSES_REFUSED,
    RESPONSES_WITHOUT_EFFECT,
    InputItems,
    InputTokens,
    ListInputItems,
    ResponseDeleted,
    ResponseObject,
    ResponsesRequest,
    RetrieveResponse,
)
from quire_schemas.openai.score import SCORE_REFUSED, ScoreList, ScoreRequest
from quire_schemas.openai.tokens import (
    DETOKENIZE_REFUSED,
    TOKENIZE_REFUSED,
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
Errors = tuple[type[Exception], ...]

ANY: Final[Errors] = (errors.InvalidRequest, errors.HostRefused, errors.InternalError)
"""What every request may end in: its headers are looked at, and anything may break."""
KEYED: Final[Errors] = (errors.Unauthenticated, errors.PermissionDenied)
"""Of what is not for everybody, once there are access policies."""
BODY: Final[Errors] = (
    errors.BodyTimeout,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
    errors.ServiceUnavailable,
)
"""Of requests with a body: the server may stop while they are worked on."""
TOKENIZER: Final[Errors] = (
    errors.ModelNotFound,
    text.BadTokenizer,
    errors.RateLimited,
    errors.BudgetSpent,
    errors.MemoryShort,
)
"""Of requests that need a model's tokenizer; they count towards limits."""
ENGINE: Final[Errors] = (
    *TOKENIZER,
    errors.ContextLengthExceeded,
    text.ParamRefused,
    errors.QueueFull,
    errors.ServiceUnavailable,
    errors.ModelStopped,
    errors.EngineUnavailable,
    errors.RequestQuarantined,
    errors.TimedOut,
)
"""Of requests that a model answers."""
TEMPLATE: Final[Errors] = (
    text.NoChatTemplate,
    text.TemplateRefused,
    text.TemplateFailed,
    text.BadTemplate,
)
"""Of requests with messages."""


STORED: Final[Errors] = (errors.StorageUnavailable, errors.StorageFull)
"""Of requests for what the router keeps."""
ONE_STORED: Final[Errors] = (*STORED, errors.NotFound, errors.Conflict)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path, and what it takes and gives. Shapes are Pydantic models, Structs, or unions of either; a tuple has
    one for each API that the path belongs to.
    """

    name: str
    """As an identifier, for those who make clients of the document."""
    path: str
    """With its parameters in braces."""
    summary: str
    methods: tuple[str, ...] = ("GET",)
    errors: Errors = ()
    """Besides `ANY`, `KEYED` if it is not public and, where there is a request, `BODY`."""
    request: type[BaseModel] | None = None
    takes: str = JSON
    """Media type of the request."""
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    """Fields of the request that are refused by name."""
    without_effect: Mapping[str, str] = field(default_factory=lambda: WITHOUT_EFFECT)
    """Fields of the request that are accepted without effect."""
    query: type[BaseModel] | None = None
    """The parameters behind the question mark."""
    answer: Any = None
    """None: not JSON, or nothing that could be said of it."""
    gives: str = JSON
    """Media type of the answer."""
    event: Any = None
    """Shape of a stream's events, where there are streams."""
    watched: bool = False
    """For whoever watches the server: parameters behind the question mark are not looked at."""
    public: bool = False
    """It needs no key."""
    unwell: str = ""
    """What a 503 means that has the answer's own shape, where there is one."""
    error: Any = ErrorBody
    """Shape of errors."""
    aliases: tuple[str, ...] = ()
    """Other paths that are the same."""


ENDPOINTS: Final = (
    Endpoint(
        "createChatCompletion",
        "/v1/chat/completions",
        "Answer the last message of a conversation.",
        ("POST",),
        ENGINE + TEMPLATE,
        request=ChatRequest,
        refused=CHAT_REFUSED,
        answer=ChatCompletion,
        event=ChatChunk,
    ),
    Endpoint(
        "createCompletion",
        "/v1/completions",
        "Go on with a text.",
        ("POST",),
        ENGINE,
        request=CompletionRequest,
        refused=COMPLETION_REFUSED,
        answer=Completion,
        event=Completion,
    ),
    Endpoint(
        "createEmbedding",
        "/v1/embeddings",
        "Make vectors of texts.",
        ("POST",),
        ENGINE,
        request=EmbeddingRequest,
        refused=EMBEDDING_REFUSED,
        answer=EmbeddingList,
    ),
    Endpoint(
        "createResponse",
        "/v1/responses",
        "Answer a conversation of items, which may go on from a response that is kept.",
        ("POST",),
        (*ENGINE, *TEMPLATE, *ONE_STORED),
        request=ResponsesRequest,
        refused=RESPONSES_REFUSED,
        without_effect=RESPONSES_WITHOUT_EFFECT,
        answer=ResponseObject,
        event=dict[str, Any],
    ),
    Endpoint(
        "countInputTokens",
        "/v1/responses/input_tokens",
        "Count the tokens of such a conversation.",
        ("POST",),
        (*TOKENIZER, *TEMPLATE, *ONE_STORED),
        request=ResponsesRequest,
        refused=RESPONSES_REFUSED,
        without_effect=RESPONSES_WITHOUT_EFFECT,
        answer=InputTokens,
    ),
    Endpoint(
        "retrieveResponse",
        "/v1/responses/{response_id}",
        "A response that is kept.",
        errors=ONE_STORED,
        query=RetrieveResponse,
        answer=ResponseObject,
    ),
    Endpoint(
        "deleteResponse",
        "/v1/responses/{response_id}",
        "Keep a response no longer.",
        ("DELETE",),
        ONE_STORED,
        answer=ResponseDeleted,
    ),
    Endpoint(
        "cancelResponse",
        "/v1/responses/{response_id}/cancel",
        "End a response in the background.",
        ("POST",),
        ONE_STORED,
        answer=ResponseObject,
    ),
    Endpoint(
        "listInputItems",
        "/v1/responses/{response_id}/input_items",
        "What a response answers.",
        errors=ONE_STORED,
        query=ListInputItems,
        answer=InputItems,
    ),
    Endpoint(
        "createScore",
        "/v1/score",
        "Tell how alike texts are.",
        ("POST",),
        ENGINE,
        request=ScoreRequest,
        refused=SCORE_REFUSED,
        without_effect=OF_CALLERS,
        answer=ScoreList,
        aliases=("/score",),
    ),
    Endpoint(
        "createMessage",
        "/v1/messages",
        "Answer the last message of a conversation, in Anthropic's words.",
        ("POST",),
        (*ENGINE, *TEMPLATE, errors.ThreadsUnsupported),
        request=MessagesRequest,
        refused=MESSAGES_REFUSED,
        without_effect=MESSAGES_WITHOUT_EFFECT,
        query=MessagesParameters,
        answer=MessagesAnswer,
        event=MessagesEvent,
        error=MessagesError,
    ),
    Endpoint(
        "countMessageTokens",
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation.",
        ("POST",),
        (*TOKENIZER, *TEMPLATE, errors.ThreadsUnsupported),
        request=CountRequest,
        refused=MESSAGES_REFUSED,
        without_effect=MESSAGES_WITHOUT_EFFECT,
        query=MessagesParameters,
        answer=TokenCount,
        error=MessagesError,
    ),
    Endpoint(
        "tokenize",
        "/v1/tokenize",
        "A text or a conversation as token ids.",
        ("POST",),
        TOKENIZER + TEMPLATE,
        request=TokenizeRequest,
        refused=TOKENIZE_REFUSED,
        without_effect=OF_CALLERS,
        answer=Tokenized,
        aliases=("/tokenize",),
    ),
    Endpoint(
        "detokenize",
        "/v1/detokenize",
        "Token ids as a text.",
        ("POST",),
        TOKENIZER,
        request=DetokenizeRequest,
        refused=DETOKENIZE_REFUSED,
        without_effect=OF_CALLERS,
        answer=Detokenized,
        aliases=("/detokenize",),
    ),
    Endpoint(
        "uploadFile",
        "/v1/files",
        "Upload the input of batches.",
        ("POST",),
        STORED,
        request=UploadForm,
        takes="multipart/form-data",
        without_effect={},
        answer=FileObject,
    ),
    Endpoint(
        "listFiles", "/v1/files", "The files that are kept.", errors=STORED, query=ListFiles, answer=FileList
    ),
    Endpoint("retrieveFile", "/v1/files/{file_id}", "One file.", errors=ONE_STORED, answer=FileObject),
    Endpoint("deleteFile", "/v1/files/{file_id}", "Remove a file.", ("DELETE",), ONE_STORED, answer=FileDeleted),
    Endpoint(
        "downloadFile",
        "/v1/files/{file_id}/content",
        "What is in a file.",
        errors=ONE_STORED,
        gives="application/octet-stream",
    ),
    Endpoint(
        "createBatch",
        "/v1/batches",
        "Have the requests of a file answered when there is room.",
        ("POST",),
        ONE_STORED,
        request=CreateBatch,
        without_effect={},
        answer=BatchObject,
    ),
    Endpoint(
        "listBatches",
        "/v1/batches",
        "The batches that are known.",
        errors=STORED,
        query=ListBatches,
        answer=BatchList,
    ),
    Endpoint("retrieveBatch", "/v1/batches/{batch_id}", "One batch.", errors=ONE_STORED, answer=BatchObject),
    Endpoint(
        "cancelBatch",
        "/v1/batches/{batch_id}/cancel",
        "End a batch with what is answered so far.",
        ("POST",),
        ONE_STORED,
        answer=BatchObject,
    ),
    Endpoint(
        "listModels",
        "/v1/models",
        "Each name that requests may use.",
        query=ListModels,
        answer=(ModelList, ModelPage),
        error=(ErrorBody, MessagesError),
    ),
    Endpoint(
        "retrieveModel",
        "/v1/models/{name}",
        "One name that requests may use.",
        errors=(errors.ModelNotFound,),
        query=MessagesParameters,
        answer=(ModelCard, ModelInfo),
        error=(ErrorBody, MessagesError),
    ),
    Endpoint(
        "health",
        "/health",
        "Whether a request can be served now.",
        ("GET", "HEAD"),
        answer=Health,
        watched=True,
        unwell="No model can serve.",
    ),
    Endpoint(
        "livez",
        "/livez",
        "Whether the process answers.",
        ("GET", "HEAD"),
        answer=Liveness,
        watched=True,
        public=True,
    ),
    Endpoint(
        "readyz",
        "/readyz",
        "Whether it is known what to serve.",
        ("GET", "HEAD"),
        answer=Readiness,
        watched=True,
        public=True,
        unwell="There has been no routing table yet.",
    ),
    Endpoint("describe", "/openapi.json", "This document.", answer=dict[str, Any], watched=True),
    Endpoint(
        "metrics",
        "/metrics",
        "The figures of this process, for Prometheus.",
        gives=CONTENT_TYPE,
        watched=True,
    ),
)


def document() -> dict[str, Any]:
    """The description of all endpoints."""
    paths: dict[str, Any] = {}
    for each in ENDPOINTS:
        for number, path in enumerate((each.path, *each.aliases)):
            operations = {method.lower(): _operation(each, method, number) for method in each.methods}
            paths.setdefault(path, _parameters_of_path(path)).update(operations)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Quire",
            "version": version("quire"),
            "description": "Language models behind the OpenAI API. A field that is not in a request's schema is a "
            "400, unless the gateway's `unknownFields` is `ignore`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": _components(), "headers": _HEADERS, "securitySchemes": _SCHEMES},
    }


@functools.cache
def as_json() -> bytes:
    """The document as it is served."""
    return msgspec.json.encode(document())


def as_text() -> str:
    """The document for people and for comparisons."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


_SCHEMES: Final[Mapping[str, Any]] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of an AccessPolicy. Without any policy none is needed.",
    },
    "key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same where Anthropic's clients put it.",
    },
}
_HEADERS: Final[Mapping[str, Any]] = {
    "X-Request-Id": {
        "description": "The request's own X-Request-Id if that was a plain word, else one that was made for it.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds after which to try again makes sense; `Retry-After-Ms` has them in milliseconds.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 120},
    },
    "WWW-Authenticate": {"description": "How to send a key.", "schema": {"const": "Bearer"}},
    "X-Should-Retry": {
        "description": "Whether the official clients are to try again.",
        "schema": {"enum": ["true", "false"]},
    },
}
_ID: Final = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}


def _operation(each: Endpoint, method: str, number: int) -> dict[str, Any]:
    """`number` of a path among those of its row: identifiers are of one operation each."""
    head = method == "HEAD"
    name = f"{each.name}{'Head' if head else ''}{number + 1 if number else ''}"
    made: dict[str, Any] = {"operationId": name, "summary": each.summary}
    if each.query is not None:
        made["parameters"] = list(_parameters(each.query))
    ends = (*ANY, *(() if each.public else KEYED), *each.errors)
    made["security"] = [] if each.public else [{}, {"bearer": []}, {"key": []}]
    if each.request is not None and method == "POST":
        ends += BODY
        content = {each.takes: {"schema": _reference(each.request)}}
        made["requestBody"] = {"required": True, "content": content}
    made["responses"] = {"200": _answer(each)}
    if each.unwell:
        made["responses"]["503"] = {**_answer(each), "description": each.unwell}
    made["responses"].update(_failures(each, ends))
    if head:
        for response in made["responses"].values():
            response.pop("content", None)
    return made


def _answer(each: Endpoint) -> dict[str, Any]:
    schema = {"type": "string"} if each.answer is None else _reference(each.answer)
    content: dict[str, Any] = {each.gives: {"schema": schema}}
    said = "The answer."
    if each.event is not None:
        said = "The answer, or with `stream: true` its events, one after another."
        shape = {"anyOf": [_reference(each.event), _reference(each.error)]}
        written = {"contentMediaType": JSON, "contentSchema": shape}
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, written]}
        content[EVENTS] = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return {"description": said, "headers": _ID, "content": content}


def _failures(each: Endpoint, ends: Iterable[type[Exception]]) -> dict[str, Any]:
    """A response for every status of these errors."""
    by_status: dict[int, list[Row]] = {}
    for kind in ends:
        by_status.setdefault(TABLE[kind].status, []).append(TABLE[kind])
    made: dict[str, Any] = {}
    for status, rows in sorted(by_status.items()):
        codes = list(dict.fromkeys(row.code for row in rows))
        schema = _reference(each.error)
        if each.error is ErrorBody:
            fields = {"type": {"enum": list(dict.fromkeys(row.type for row in rows))}, "code": {"enum": codes}}
            schema = {"allOf": [schema, {"properties": {"error": {"properties": fields}}}]}
        named = [code for code in codes if code is not None]
        if each.error is MessagesError and named:
            details = {"properties": {"error_code": {"enum": named}}}
            schema = {"allOf": [schema, {"properties": {"error": {"properties": {"details": details}}}}]}
        if str(status) == "503" and each.unwell:
            schema = {"anyOf": [_reference(each.answer), schema]}
        *words, last = ["null" if code is None else f"`{code}`" for code in codes]
        said = f"`code` is {', '.join(words)} or {last}." if words else f"`code` is {last}."
        headers = dict(_ID)
        if any(row.retry is not None for row in rows):
            headers |= {
                name: {"$ref": f"#/components/headers/{name}"} for name in ("Retry-After", "X-Should-Retry")
            }
        if any(row.challenge for row in rows):
            headers["WWW-Authenticate"] = {"$ref": "#/components/headers/WWW-Authenticate"}
        made[str(status)] = {
            "description": said,
            "headers": headers,
            "content": {JSON: {"schema": schema}},
        }
    return made


def _parameters_of_path(path: str) -> dict[str, Any]:
    named = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    return {"parameters": named} if named else {}


def _parameters(query: type[BaseModel]) -> Iterator[dict[str, Any]]:
    schema = _plain(query.model_json_schema(), _notes(query))
    for name, of_field in schema["properties"].items():
        said = {"description": of_field.pop("description")} if "description" in of_field else {}
        required = name in schema.get("required", ())
        yield {"name": name, "in": "query", **said, "required": required, "schema": of_field}


def _shapes() -> list[Any]:
    """Every shape that the table names, once."""
    found: dict[Any, None] = {}
    for each in ENDPOINTS:
        for kind in (each.request, each.answer, each.event, each.error):
            for one in kind if isinstance(kind, tuple) else (kind,):
                if one is not None:
                    found.setdefault(one)
    return list(found)


def _is_struct(kind: Any) -> bool:
    return all(isinstance(part, type) and issubclass(part, msgspec.Struct) for part in get_args(kind) or (kind,))


_COMPONENTS: Final = "#/components/schemas/"


@dataclass(frozen=True, slots=True)
class _Schemas:
    """A schema for each shape of the table, and the components that these refer to, by name."""

    of_shape: Mapping[Any, Any]
    components: Mapping[str, Any]

    def name(self, kind: Any) -> str:
        """The component that a shape is."""
        return str(self.of_shape[kind]["$ref"]).rpartition("/")[2]


@functools.cache
def _schemas() -> _Schemas:
    """Made by the libraries, each for its own kind of shapes."""
    shapes = _shapes()
    structs = [kind for kind in shapes if _is_struct(kind)]
    made, components = msgspec.json.schema_components(structs, ref_template=_COMPONENTS + "{name}")
    others = [kind for kind in shapes if not _is_struct(kind)]
    by_key, more = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in others], ref_template=_COMPONENTS + "{model}"
    )
    of_shape = dict(zip(structs, made, strict=True)) | {kind: schema for (kind, _), schema in by_key.items()}
    for name, schema in more.get("$defs", {}).items():
        if components.setdefault(name, schema) is not schema:
            raise ValueError(f"a model and a Struct of the API have the name {name}")
    notes = {_mangled(kind): _notes(kind) for kind in _classes()}
    notes |= {kind.__name__: notes[_mangled(kind)] for kind in _classes() if kind.__name__ in components}
    return _Schemas(
        {kind: _plain(schema, {}) for kind, schema in of_shape.items()},
        {_short(name): _plain(schema, notes.get(name, {})) for name, schema in sorted(components.items())},
    )


def _mangled(kind: type) -> str:
    """What Pydantic calls a class that has its name in common with another."""
    return f"{kind.__module__}.{kind.__qualname__}".replace(".", "__")


def _short(name: str) -> str:
    """The same in fewer words: the module's and the class's own."""
    *_, module, own = ("__" + name).split("__")
    return module.capitalize() + own


def _reference(kind: Any) -> dict[str, Any]:
    if isinstance(kind, tuple):
        return {"anyOf": [_reference(one) for one in kind]}
    schema: dict[str, Any] = _schemas().of_shape[kind]
    return copy.deepcopy(schema)


def _components() -> dict[str, Any]:
    """The schemas by name, those of requests with the fields that are without effect."""
    made = copy.deepcopy(dict(_schemas().components))
    for each in ENDPOINTS:
        if each.request is not None:
            properties = made[_schemas().name(each.request)]["properties"]
            for name, purpose in each.without_effect.items():
                told = {"description": f"Accepted without effect: {purpose}."}
                properties.setdefault(name, told | IDLE[name].kind.json_schema())
    return made


def _classes() -> set[type]:
    """Every class that the shapes of the table are made of."""
    found: set[type] = set()
    for kind in _shapes():
        _gather(kind, found)
    return found


def _gather(kind: Any, classes: set[type]) -> None:
    if isinstance(kind, type) and kind.__module__.startswith("quire_schemas.") and kind not in classes:
        classes.add(kind)
        for hint in get_type_hints(kind, include_extras=True).values():
            _gather(hint, classes)
    for part in (*get_args(kind), getattr(kind, "json_schema_input_type", None)):
        if part is not None:
            _gather(part, classes)


def _notes(kind: type) -> dict[str, str]:
    """By the name that JSON has, the string below each field of a class, its own or inherited."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not each.__module__.startswith("quire_schemas."):
            continue
        try:
            source = inspect.getsource(each)
        except OSError:  # a class that a program made
            continue
        body = ast.parse(textwrap.dedent(source)).body[0]
        for said, below in pairwise(body.body if isinstance(body, ast.ClassDef) else ()):
            if not (isinstance(said, ast.AnnAssign) and isinstance(said.target, ast.Name)):
                continue
            found.pop(said.target.id, None)  # one that is declared anew has its own note, or none
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[said.target.id] = " ".join(str(below.value.value).split())
    if issubclass(kind, BaseModel):
        return {each.alias or name: found[name] for name, each in kind.model_fields.items() if name in found}
    if issubclass(kind, msgspec.Struct):
        names = {each.name: each.encode_name for each in msgspec.structs.fields(kind)}
        return {names[name]: note for name, note in found.items()}
    return found


def _plain(schema: Any, notes: Mapping[str, str]) -> Any:
    """A schema without titles and empty defaults, with references by short names, and with notes at its fields."""
    if isinstance(schema, list):
        return [_plain(part, {}) for part in schema]
    if isinstance(schema, str) and schema.startswith(_COMPONENTS):
        return _COMPONENTS + _short(schema.removeprefix(_COMPONENTS))
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {
                name: {"description": notes[name]} | _plain(part, {}) if name in notes else _plain(part, {})
                for name, part in value.items()
            }
        elif key in ("enum", "const", "default", "examples"):
            if key != "default" or value is not None:
                made[key] = value
        elif key == "description":
            made[key] = " ".join(str(value).split())
        elif key != "title":
            made[key] = _plain(value, {})
    return made
