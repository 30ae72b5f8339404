"""The stages of the flow, one file each: source, decode, compress, cache, answer, sink."""
