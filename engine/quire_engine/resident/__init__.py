"""Steps on a device that go on without the host: requests have rows there, and plans need no tokens.

table.py     RequestTable: which row a request has, what of it lies on the device, what has to be sent
draws.py     how requests draw, in the words of the device
program.py   StepProgram: a step from addresses to drawn tokens, captured as graphs by shape
runner.py    ResidentRunner: begins a plan behind the one that runs, and gives its tokens when they are there
pipeline.py  Pipeline: the next plan behind the one that runs, or by way of the host where it must
"""
