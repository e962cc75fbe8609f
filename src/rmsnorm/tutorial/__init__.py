"""The room of the lesson: `rmsnorm learn`, twelve questions in a page that computes, in English and in Chinese.

A figure is one JavaScript file that computes, draws and names its controls. The texts are one file for each language.
"""
