"""Chat templates: a checkpoint's Jinja program turns messages into the prompt its model was trained on.

A template is code from wherever the weights came from, so it runs in Jinja's immutable sandbox, and under bounds
of our own, because a sandbox keeps a template from our objects but not from our time and memory:

- every pass of a loop, every call of a macro and every item that a filter takes costs one of `MAX_TICKS`, and so
  do each `CHARS_PER_TICK` characters of any text made; now and then the processor time that the thread has spent
  on the rendering is looked at (`MAX_CPU_SECONDS`);
- no single text may be longer than `MAX_CHARS`. Every operation that makes a long text, or list, out of short ones
  (`+ * ~ %`, slices, padding, `replace`, `join`, `format`, `indent`, `range`, a list written out as text) is
  checked before it runs;
- filters are those of `FILTERS`, which is what chat templates use. Each takes its items through the count; those
  that could not be bounded in a line (`batch`, `slice`, `center`, `wordwrap`, …) are not there;
- the output is read piece by piece and cut off at `MAX_CHARS`;
- whoever has others waiting may have it tried for a moment only (`briefly`), and begin it again elsewhere.

The counting is put into the program when it is compiled: the syntax tree gets a call at the head of each loop and
macro, and each `~` and each slice becomes a call. Nothing is computed while compiling. What a template may use
besides is what the Hugging Face convention offers: `raise_exception`, `strftime_now`, `tojson` without HTML
escapes, `namespace`, `dict`, loop controls, and the `generation` block, which marks the assistant's part for
training and is transparent here.
"""

from __future__ import annotations

import datetime
import json
import re
import string
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
import jinja2.visitor
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.text.errors import BadTemplate, TemplateFailed, TemplateRefused

MAX_CHARS: Final = 16 * 1024 * 1024
MAX_RANGE: Final = 100_000
MAX_BITS: Final = 4096
MAX_TICKS: Final = 2_000_000
CHARS_PER_TICK: Final = 64
MAX_CPU_SECONDS: Final = 1.0
RESERVED: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "raise_exception", "strftime_now"}
    | {"namespace", "dict", "range", "bos_token", "eos_token", "unk_token", "pad_token"}
    | {"self", "continue_final_message"}
)
"""Names that `chat_template_kwargs` of a request may not set."""
_CHEAP: Final = frozenset(
    ["abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "round", "safe"]
)
"""Filters whose work and result are small whatever they are given."""
_LAZY: Final = frozenset(["list", "map", "reject", "rejectattr", "select", "selectattr"])
"""Filters that go through a sequence, item by item."""
_EAGER: Final = frozenset(["join", "max", "min", "sort", "sum", "unique"])
"""Filters that compare, join or add the items of a sequence, and so are charged for the whole of each."""
_TEXTUAL: Final = frozenset(["capitalize", "dictsort", "e", "escape", "format", "indent", "lower"]) | frozenset(
    ["replace", "reverse", "string", "title", "tojson", "trim", "upper"]
)
"""Filters that make a text, or a sequence, from one value."""
FILTERS: Final = _CHEAP | _LAZY | _EAGER | _TEXTUAL
_BREAKS: Final = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_ENTRY: Final = 8
"""Characters that anything which is no text counts for."""
_PERCENT: Final = re.compile(r"%[-+ #0]*(\d*)(?:\.(\d*))?")
_DIGITS: Final = re.compile(r"\d+")
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class _Refused(jinja2.TemplateError):
    """`raise_exception` was called."""


class _OverBudget(SecurityError):
    """The template ran over one of its bounds."""


class TakesLong(Exception):
    """A rendering takes longer than `briefly` allows."""


_brief: ContextVar[float | None] = ContextVar("quire_template_brief", default=None)


@contextmanager
def briefly(seconds: float) -> Iterator[None]:
    """Renderings inside raise `TakesLong` when they take more processor time than that."""
    token = _brief.set(seconds)
    try:
        yield
    finally:
        _brief.reset(token)


class _Budget:
    """What one rendering has left."""

    __slots__ = ("_brief", "_deadline", "_look_at", "_ticks")

    def __init__(self) -> None:
        self._ticks = MAX_TICKS
        self._look_at = MAX_TICKS
        self._brief = _brief.get()
        self._deadline = time.thread_time() + (MAX_CPU_SECONDS if self._brief is None else self._brief)

    def take(self, ticks: int) -> None:
        self._ticks -= ticks
        if self._ticks > self._look_at:
            return
        self._look_at = self._ticks - 32
        late = time.thread_time() > self._deadline
        if late and self._brief is not None:
            raise TakesLong
        if late or self._ticks < 0:
            raise _OverBudget("the template runs too long")


_budget: ContextVar[_Budget] = ContextVar("quire_template_budget")


def _tick(ticks: int) -> str:
    _budget.get().take(ticks)
    return ""


def _bounded(size: int) -> None:
    """Allow, and charge, a text of `size` characters."""
    if size > MAX_CHARS:
        raise _OverBudget("the template makes a text that is too long")
    _budget.get().take(1 + size // CHARS_PER_TICK)


def _weigh(value: object) -> None:
    """Allow, and charge, `value` written out as text, with all that lies in it."""
    budget = _budget.get()
    size = 0
    left = [value]
    while left:
        item = left.pop()
        before = len(left)
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            left.extend(item.keys())
            left.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            left.extend(item)
        elif isinstance(item, jinja2.utils.Namespace):
            raise SecurityError("a namespace has no text")
        size += _ENTRY * (1 + len(left) - before)
        if size > MAX_CHARS:
            raise _OverBudget("the template makes a text that is too long")
        budget.take(1 + (len(left) - before) // _ENTRY)
    budget.take(size // CHARS_PER_TICK)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for item in items:
        budget.take(1)
        yield item


def _bounded_number(bits: int) -> None:
    if bits > MAX_BITS:
        raise _OverBudget("the template makes a number that is too large")


def _length(value: object) -> int:
    """Characters of a text; those that the entries of a list count for."""
    if isinstance(value, str):
        return len(value)
    return _ENTRY * len(value) if isinstance(value, list | tuple) else 0


def _concat(*parts: object) -> str:
    _weigh(parts)
    return "".join([str(part) for part in parts])


def _slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    _bounded(_length(value))
    return value[start:stop:step]


@jinja2.pass_context
def _written(context: jinja2.runtime.Context, value: Any) -> Any:
    """What `{{ … }}` puts out. It takes the context so that Jinja does not call it while compiling."""
    if isinstance(value, str):
        _bounded(len(value))
    else:
        _weigh(value)
    return value


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MAX_RANGE:
        raise _OverBudget(f"range() is bounded to {MAX_RANGE} items")
    return made


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(str(form)[:256])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int):
        _bounded(indent * 1024)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _sized(plain: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
    """The filter `plain`, called only when the bound on its result holds."""

    @wraps(plain)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _bounded(size(*args, **kwargs))
        return plain(*args, **kwargs)

    return checked


def _charged(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `plain`, charged for what it is given."""
    at = 1 if hasattr(plain, "jinja_pass_arg") else 0  # before the value comes the context or the environment

    @wraps(plain)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value = args[at]
        if name in _CHEAP:
            _tick(1)
        elif name in _TEXTUAL:
            _weigh([*args[at:], *kwargs.values()])
        elif value:  # an empty or undefined one is the filter's own matter
            value = _counted(value)
            if name in _EAGER:
                value = list(value)
                _weigh(value)
        return plain(*args[:at], value, *args[at + 1 :], **kwargs)

    return checked


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0
) -> Any:
    """The sum of numbers: of lists it would be a quadratic concatenation."""
    total = start
    for item in value:
        number = _member(item, attribute)
        if not isinstance(number, int | float) or not isinstance(total, int | float):
            raise SecurityError("sum is offered for numbers only")
        total += number
    return total


def _replaced_size(text: object, old: object, new: object, *_: object, **__: object) -> int:
    whole = str(text)
    return len(whole) + whole.count(str(old)) * len(str(new))


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else MAX_CHARS + 1


def _percent_size(form: object, *args: object, **_: object) -> int:
    """An upper bound of the padding a `%` format can ask for: widths in it, and in `args` where it has `*`."""
    widths = sum(_number(run) for found in _PERCENT.findall(str(form)) for run in found if run)
    if "*" in str(form):
        widths += sum(abs(arg) for arg in args if isinstance(arg, int))
    return widths


def _format_size(form: str, args: Iterable[object]) -> int:
    """The same for `str.format`: digits in the format specs, and in `args` where a spec has a field of its own."""
    specs = [spec for _, _, spec, _ in string.Formatter().parse(form) if spec]
    texts = [*specs, *(map(str, args) if any("{" in spec for spec in specs) else ())]
    return sum(_number(run) for text in texts for run in _DIGITS.findall(text))


class _TemplateDict:
    """`dict` as templates see it: it makes dictionaries and shows nothing of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        _bounded(_ENTRY * sum(len(arg) for arg in args if hasattr(arg, "__len__")))
        return dict(*args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders its body and nothing else."""

    tags = {"generation"}  # noqa: RUF012 (the attribute's type is Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Instrument(jinja2.visitor.NodeTransformer):
    """Puts the calls of the module's docstring into a template's syntax tree."""

    @staticmethod
    def _call(name: str, args: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Call:
        target = jinja2.nodes.Name(name, "load", lineno=line)
        return jinja2.nodes.Call(target, args, [], None, None, lineno=line)

    def _with_tick(self, node: Any) -> Any:
        self.generic_visit(node)
        # text that stands in the body as it is can be collected (`set` blocks, macros) as often as the body runs
        constant = sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))
        cost = jinja2.nodes.Const(1 + constant // CHARS_PER_TICK, lineno=node.lineno)
        call = self._call("_quire_tick", [cost], node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=node.lineno))
        return node

    visit_For = _with_tick
    visit_Macro = _with_tick
    visit_CallBlock = _with_tick

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("_quire_concat", list(node.nodes), node.lineno)

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, jinja2.nodes.Slice):
            return node
        none = jinja2.nodes.Const(None, lineno=node.lineno)
        bounds = [bound if bound is not None else none for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return self._call("_quire_slice", [node.node, *bounds], node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with bounds; see the module's docstring."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            cache_size=0,
            optimized=False,
            finalize=_written,
        )
        self.filters["tojson"] = _tojson
        self.filters["sum"] = _sum
        self.filters["indent"] = _sized(
            jinja2.filters.do_indent,
            lambda s, width=4, *_, **__: (
                len(s) + (s.count("\n") + 1) * (width if isinstance(width, int) else len(width))
            ),
        )
        self.filters["format"] = _sized(jinja2.filters.do_format, _percent_size)
        self.filters["replace"] = _sized(
            lambda text, old, new, count=-1: str(text).replace(old, new, -1 if count is None else count),
            _replaced_size,
        )
        self.filters["join"] = self._join
        self.filters = {name: _charged(name, self.filters[name]) for name in sorted(FILTERS)}
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_TemplateDict(),
            range=_range,
            _quire_tick=_tick,
            _quire_concat=_concat,
            _quire_slice=_slice,
        )
        for name in ("cycler", "joiner", "lipsum"):
            self.globals.pop(name, None)

    @staticmethod
    def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = [str(_member(item, attribute)) for item in value]
        _bounded(sum(map(len, items)) + len(str(d)) * len(items))
        return str(d).join(items)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        _Instrument().visit(tree)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _bounded(_length(left) + _length(right))
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _bounded(_length(text) * times)
            if isinstance(left, int) and isinstance(right, int):
                _bounded_number(left.bit_length() + right.bit_length())
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _bounded_number(left.bit_length() * max(right, 0))
        elif isinstance(left, str):
            _weigh((left, right))
            _bounded(_percent_size(left, *(right if isinstance(right, tuple) else (right,))))
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if obj in _INSTRUMENTS:  # ours, and called at every turn of a loop
            return obj(*args)
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            _bounded(len(owner))
            if name in {"center", "ljust", "rjust", "zfill", "expandtabs"}:
                width = next((a for a in (*args, *kwargs.values()) if isinstance(a, int)), 0)
                _bounded(width * (owner.count("\t") if name == "expandtabs" else 1))
            elif name == "replace" and len(args) >= 2:
                _bounded(_replaced_size(owner, args[0], args[1]))
            elif name == "join" and args:
                items = list(_counted(args[0]))
                _bounded(len(owner) * len(items) + sum(map(_length, items)))
                args = (items, *args[1:])
            elif name in {"split", "rsplit", "splitlines"}:
                _tick(_pieces(owner, name, args, kwargs))
            elif name in {"format", "format_map"}:
                _weigh([*args, *kwargs.values()])
                _bounded(_format_size(owner, [*args, *kwargs.values()]))
            elif name == "translate":
                raise SecurityError("str.translate is not offered to templates")
        return super().call(context, obj, *args, **kwargs)


def _member(item: Any, attribute: str | int | None) -> Any:
    """`item`, or its entry `attribute`: templates see plain dictionaries and lists only."""
    if attribute is None:
        return item
    try:
        return item[attribute]
    except (TypeError, LookupError):
        return ""


def _pieces(text: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """An upper bound of the pieces that splitting gives."""
    if name == "splitlines":
        return 1 + sum(map(text.count, _BREAKS))
    separator = args[0] if args else kwargs.get("sep")
    return 1 + (text.count(separator) if isinstance(separator, str) else len(text) // 2)


_INSTRUMENTS: Final = frozenset({_tick, _concat, _slice})
_environment = _Environment()


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    template = _environment.from_string(source)
    template.globals = dict(template.globals)  # each rendering copies it, which takes long from a chain of maps
    return template


@lru_cache(maxsize=64)
def _looked_at(source: str) -> frozenset[str]:
    return frozenset(jinja2.meta.find_undeclared_variables(_environment.parse(source)))


class ChatTemplate:
    """One compiled chat template.

    `special_tokens` are the names a template may use for the model's special tokens (`bos_token`, …).
    Raises `BadTemplate` when the source does not compile.
    """

    __slots__ = ("_special_tokens", "_template", "source", "variables")

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _compiled(source)
        except Exception as error:  # Python compiles what Jinja wrote, and has bounds and errors of its own
            line = getattr(error, "lineno", None)
            raise BadTemplate(f"the chat template does not compile{f' (line {line})' if line else ''}") from error
        self.variables = _looked_at(source)
        """Names that the template looks at."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. `variables` are further names the template may look at, such as `enable_thinking`.

        With `continue_final_message` the text ends inside the last message, so that the model goes on with it.
        Messages are plain JSON values; `content` of the last one is a string when it is to be continued.
        Raises `TemplateRefused` and `TemplateFailed`.
        """
        plain = [_with_reasoning(message) for message in messages]
        mark = "\x02quire-continue\x03"
        if continue_final_message:
            plain[-1] = {**plain[-1], "content": f"{plain[-1].get('content') or ''}{mark}"}
        text = self._run(
            {
                **self._special_tokens,
                **variables,
                "messages": plain,
                "tools": list(tools) if tools else None,
                "documents": list(documents) if documents else None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        if continue_final_message:
            head, found, _ = text.rpartition(mark)
            if not found:
                raise TemplateFailed("this model's chat template leaves out the final message to be continued")
            return head
        return text

    def _run(self, variables: dict[str, Any]) -> str:
        token = _budget.set(_Budget())
        context = self._template.new_context(variables)
        try:
            pieces: list[str] = []
            size = 0
            for piece in self._template.root_render_func(context):
                size += len(piece)
                if size > MAX_CHARS:
                    raise _OverBudget("the prompt is too long")
                pieces.append(piece)
            return "".join(pieces)
        except TakesLong:
            raise
        except _Refused as error:
            words = "".join(c if c.isprintable() else " " for c in str(error))[:200]
            raise TemplateRefused(words) from error
        except _OverBudget as error:
            raise TemplateFailed("this model's chat template ran over its bounds of time or size") from error
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateFailed("this model's chat template cannot render these messages") from error
        finally:
            context.vars.clear()  # its macros hang on it: both would wait for the search for garbage
            _budget.reset(token)


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each of the names that templates look for."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if thought is None:
        return dict(message)
    return {"thinking": thought, **message, "reasoning_content": thought}
