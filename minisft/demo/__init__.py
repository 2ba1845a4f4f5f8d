"""The default job: teach a small world to a small Llama, then teach the Llama to answer questions about it.

Everything is made here, nothing is downloaded. A base model reads plain articles about all the countries of
`world.tsv`; supervised fine-tuning then shows it questions and answers about half of them. What it answers about the
other half it can only know from the articles: fine-tuning taught it to answer, not the facts.
"""
