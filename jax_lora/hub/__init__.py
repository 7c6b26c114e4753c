"""Models and adapters on the Hugging Face Hub: names, downloads, uploads.

`huggingface_hub` does the transfers and keeps the cache. It is imported when a name is looked up,
and comes with the extra `hub`.
"""
