"""The console: one page in a browser that shows what the control plane knows, and lets people try a model.

`platform console` asks the control plane, over its Unix socket, to listen on loopback besides (`listener`), and
prints a link with a token. Everything that comes there passes `guard` first: only names of loopback are answered
to, only the page's own origin may ask, and who has no token (`links`) is given the page's own files (`files`) and
nothing else. Behind it are those questions of the admin API that change nothing, what the router told of its load
over the last minutes (`load`, whose figures `quire.series` reads), and a way through to the router for the
playground (`relay`).

What is served is changed by manifests alone: there is nothing here that could.
"""
