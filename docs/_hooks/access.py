"""Names for what the theme leaves without one, for those who listen to a page."""


def on_post_page(output: str, page, config) -> str:
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)
