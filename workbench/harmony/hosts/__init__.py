"""Transcripts from elsewhere: any OpenAI-compatible host, evaluation logs, plain files of conversations."""
