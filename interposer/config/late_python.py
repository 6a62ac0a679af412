"""Programs that may load a libpython of their own after their start, and then find the policy engine's (P8).

Such a program crashes, so its policy is asked of the helper process, unless a [[process]] section that applies to it
says otherwise. A program that is linked with libpython needs no entry: the library sees that.
"""

from __future__ import annotations

PLACE = "built-in list of programs that may load Python"

# The name of the executable (globs as in `exe`), and what loads Python there.
PROGRAMS = {
    "apache2": "mod_wsgi, mod_python",
    "babeltrace2": "the Python plug-in provider",
    "bareos-*": "the Python plug-ins",
    "bluefish": "the zencoding plug-in",
    "caja": "python-caja",
    "claws-mail": "the Python plug-in",
    "collectd": "the python plug-in",
    "dicod": "the python module",
    "eog": "plug-ins in Python",
    "freeradius": "rlm_python3",
    "freeswitch": "mod_python3",
    "gdb*": "scripts in Python",
    "gedit": "plug-ins in Python",
    "gmond": "mod_python",
    "gnumeric": "the Python loader",
    "gst-*": "the Python plug-in loader",
    "gvim": "scripts in Python",
    "hexchat": "the Python plug-in",
    "httpd": "mod_wsgi, mod_python",
    "julia": "PyCall",
    "kamailio": "app_python3",
    "krita": "plug-ins in Python",
    "kvirc": "the Python module",
    "liferea": "plug-ins in Python",
    "lldb*": "scripts in Python",
    "mserver5": "functions in Python",
    "nautilus": "nautilus-python",
    "nbdkit": "the python plug-in",
    "nemo": "nemo-python",
    "obs": "scripts in Python",
    "opensips": "the python module",
    "orthanc": "the Python plug-in",
    "pluma": "plug-ins in Python",
    "postgres": "PL/Python",
    "profanity": "plug-ins in Python",
    "qgis*": "plug-ins in Python",
    "R": "reticulate",
    "radiusd": "rlm_python3",
    "remmina": "the Python plug-in",
    "rhythmbox": "plug-ins in Python",
    "rsession": "reticulate",
    "soffice.bin": "PyUNO",
    "ssconvert": "the Python loader",
    "syslog-ng": "mod-python",
    "texworks": "scripts in Python",
    "Thunar": "thunarx-python",
    "thunar": "thunarx-python",
    "totem": "plug-ins in Python",
    "unitd": "the Python language module",
    "uwsgi*": "the python plug-in",
    "vim": "scripts in Python",
    "vim.*": "scripts in Python",
    "weechat*": "the python plug-in",
    "znc": "modpython",
}
