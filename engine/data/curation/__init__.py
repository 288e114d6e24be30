"""Curation: steps that remove or change records, run over sources on several processes, with an account of all that was removed."""
