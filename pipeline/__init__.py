"""Caption, or answer questions about, a corpus of videos: stages on Ray Data."""
