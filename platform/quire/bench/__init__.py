"""Load on an OpenAI-compatible server, and what it makes of it: the mechanism behind `platform bench`.

`lengths` and `schedule` draw how long requests are and when they are sent, `prompts` makes texts of a wanted
number of tokens out of words whose cost it asked the server for, `work` puts these together into requests, all
from one seed. `load` sends them, either so many at a time or by the schedule, and times what comes; `figures`
makes percentiles and goodput of that, `report` lines, `plot` a picture. `drive` is the whole way from settings to
result.

Exceptions:

    BenchError             has message and hint: nothing was measured
    ├── BadSetting         what was asked for cannot be
    └── BadFile            a trace, a data set or a saved result cannot be read, or a file cannot be written
"""

from quire.bench.errors import BadFile, BadSetting, BenchError

__all__ = ["BadFile", "BadSetting", "BenchError"]
