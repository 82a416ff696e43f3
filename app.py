"""The web app and the entry of the Space: write, draw and speak with the shipped models."""

from genssm.interface.serving import serve

if __name__ == "__main__":
    serve()
