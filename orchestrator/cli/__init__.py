"""The command line. Commands parse, open the runtime, call one verb, and print."""
