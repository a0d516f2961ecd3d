"""One file a verb of the command line: `add(verbs)` describes it, the function it names runs it."""
