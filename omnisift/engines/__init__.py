"""Engines that answer: the same questions in, the same answers out; transformers or vLLM inside."""
