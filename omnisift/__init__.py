"""OmniSIFT for Qwen2.5-Omni: shorten the audio-video prompt once, answer from what is kept."""
