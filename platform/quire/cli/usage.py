"""`platform usage`: requests, tokens and money by policy, key and model out of the router's ledger, and how
budgets stand."""

from __future__ import annotations

import re
import sys
import time

import click

from quire.cli import render
from quire.cli.outcome import ExitCode, usage_error
from quire.cli.session import connect

COLUMNS = ("day", "policy", "key", "model")
TOKENS = {
    "REQUESTS": "requests",
    "PROMPT": "promptTokens",
    "CACHED": "cachedTokens",
    "COMPLETION": "completionTokens",
    "COST": "cost",
}
BUDGETS = ("POLICY", "KEY", "BUDGET", "UNIT", "SIZE", "SPENT", "LEFT", "STATE", "RESETS")


@click.command(short_help="Tell who has used how many requests and tokens.")
@click.option(
    "--by",
    multiple=True,
    type=click.Choice(COLUMNS),
    help="Add up by this; may be given several times. Left out: policy, key and model.",
)
@click.option(
    "--since", default="30d", show_default=True, help="A day such as 2027-01-31, or a time back from now."
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def usage(by: tuple[str, ...], since: str, output: str) -> int:
    """Tell who has used how much: requests, the tokens of prompts and answers, and what they cost. Below it, how
    the budgets of AccessPolicies stand now, whatever the options say.

    CACHED are those of PROMPT that were not computed again. COST is by the spec.prices that Models had at the
    time. Days are those of UTC; what came in the last seconds is included. Keys and policies that are no more are
    still there."""
    columns = [name for name in COLUMNS if name in (by or ("policy", "key", "model"))]
    answer = connect().get("/v1/usage", since=_day(since), by=",".join(columns))
    if output == "json":
        render.dump(answer, output, "UsageList")
        return ExitCode.OK
    if answer["items"]:
        rows = [
            [*(item[name] or "-" for name in columns), *(str(item[name]) for name in TOKENS.values())]
            for item in answer["items"]
        ]
        print("\n".join(render.table((*(name.upper() for name in columns), *TOKENS), rows)))
    else:
        print(f"nothing was used since {answer['since']}", file=sys.stderr)
    if answer["budgets"]:
        names = ("policy", "key", "name", "unit", "size", "spent", "left", "state", "resetsAt")
        rows = [
            ["-" if budget[name] in ("", None) else str(budget[name]) for name in names]
            for budget in answer["budgets"]
        ]
        print("\n".join(["", *render.table(BUDGETS, rows)] if answer["items"] else render.table(BUDGETS, rows)))
    return ExitCode.OK


def _day(since: str) -> str:
    """The first day that is meant, in UTC."""
    from quire_schemas.quantities import BadQuantity, parse_duration

    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", since):
        try:
            time.strptime(since, "%Y-%m-%d")
        except ValueError:
            usage_error(f"{since} is no day", "write it as 2027-01-31")
        return since
    try:
        back = parse_duration(since)
    except BadQuantity:
        hint = "a day such as 2027-01-31, or a time back from now such as 12h or 30d"
        usage_error(f"--since {since!r} is neither a day nor a time", hint)
    return time.strftime("%Y-%m-%d", time.gmtime(max(time.time() - back, 0)))
