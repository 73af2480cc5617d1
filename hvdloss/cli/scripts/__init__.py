"""Programs that run in their own process: they import frameworks, and print one line of JSON.

They are started by path, so that neither the caller's working folder nor hvdloss itself is on
their search path, and import nothing from hvdloss.
"""
