"""Inspection: what an adapter is, by its headers, its weights and the base that it may go with; nothing is written."""
