"""The default job: teach a small world to a small Llama, then teach the Llama to answer questions about it.

Everything is made here; nothing is downloaded.
"""
