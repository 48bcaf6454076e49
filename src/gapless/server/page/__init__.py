"""The page at /: a playground, a dashboard and a timeline. Static files, as they lie here; no build step."""

from gapless.server.page.routes import page_router

__all__ = ["page_router"]
