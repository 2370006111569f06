"""A server of the OpenAI API as its client sees it: what `platform chat` and `platform bench` speak through.

`http` sends requests and hands on what comes, `sse` finds the events of a stream in it, `server` knows the paths,
the shapes and the errors of the API. It is written for many streams in one process: what comes is handed to a
function within the event loop's own call, and no task wakes for it.

Exceptions:

    RemoteError            has message and hint, and `kind`: a few words to count it under
    ├── Unreachable        no connection: refused, no such host, a certificate that is not trusted
    ├── Lost               the connection, or the stream, ended before the answer did
    ├── TimedOut           no whole answer within the time
    ├── Unreadable         what came is not what the API says
    ├── Refused            the server answered with an error status
    └── BrokenOff          a stream ended with an error event
"""

from quire.remote.errors import BrokenOff, Lost, Refused, RemoteError, TimedOut, Unreachable, Unreadable
from quire.remote.server import Chunk, Server, Usage

__all__ = [
    "BrokenOff",
    "Chunk",
    "Lost",
    "Refused",
    "RemoteError",
    "Server",
    "TimedOut",
    "Unreachable",
    "Unreadable",
    "Usage",
]
