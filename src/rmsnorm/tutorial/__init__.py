"""The room of the tutorial: `rmsnorm learn`, nine panels in a browser, in English and in Chinese.

A panel is one file that computes (plain functions on tensors), draws, and names its controls and its question. The
notebook and the static pages show the same panels; the texts are one Markdown file for each language.
"""
