"""Silent bugs: exhibits that any trainer can be held to. `python benchmarks/silent --help`; README.md says more."""
