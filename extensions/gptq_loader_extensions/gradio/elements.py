"""Name the page's elements: the ids and classes that Python, style.css and page.js share.

A new element gets its name here. Tests hold that each id of the style sheet, the script and the
browser's tests is one of these, and that each of these is on the page.
"""

from __future__ import annotations

# The header
ABOUT = "about"
WHY = "why"
HEADLINE = "headline"
TEMPLATE = "template"

# Settings; a number's id is the name of its option
SETTINGS = "settings"
SYSTEM = "system"
CARD_SYSTEM = "card-system"
PRESET = "preset"
SAMPLING = "sampling"
MAX_NEW_TOKENS = "max_new_tokens"
TEMPERATURE = "temperature"
TOP_P = "top_p"
TOP_K = "top_k"
MIN_P = "min_p"
REPETITION_PENALTY = "repetition_penalty"
SEED = "seed"

# Chat
CHAT_TAB = "chat-tab"
TALKS = "talks"
PICKER = "picker"
NEW = "new"
DELETE = "delete"
CHAT = "chat"
ASK = "ask"
MESSAGE = "message"
SEND = "send"
STOP = "stop"
BELOW = "below"
STATUS = "status"
RETRY = "retry"
UNDO = "undo"
MORE = "more"
SHOW_PROMPT = "show-prompt"
EXPORT_JSON = "export-json"
EXPORT_MARKDOWN = "export-markdown"
PROMPT_VIEW = "prompt-view"
KEPT = "kept"
FILE = "file"

# Raw
RAW_TAB = "raw-tab"
RAW_PROMPT = "raw-prompt"
RAW_COMPLETE = "raw-complete"
RAW_STOP = "raw-stop"
RAW_APPEND = "raw-append"
RAW_PROBLEM = "raw-problem"
RAW_REPLY = "raw-reply"
RAW_STATUS = "raw-status"

# Compare
COMPARE_TAB = "compare-tab"
CHOOSE_OTHER = "choose-other"
OTHER = "other"
OTHER_CANCEL = "other-cancel"
COMPARE_UNLOAD = "compare-unload"
OTHER_LOADING = "other-loading"
COMPARE_MESSAGE = "compare-message"
COMPARE = "compare"
COMPARE_STOP = "compare-stop"
NAME_ONE = "name-one"
NAME_TWO = "name-two"
REPLY_ONE = "reply-one"
REPLY_TWO = "reply-two"
STATUS_ONE = "status-one"
STATUS_TWO = "status-two"
COMPARE_WORDS = "compare-words"
MEASURE_ROW = "measure-row"
MEASURE_ON = "measure-on"
MEASURE = "measure"
MEASURE_STOP = "measure-stop"
MEASURE_TEXT = "measure-text"
MEASURING = "measuring"
MEASURED_ON = "measured-on"
CHART = "chart"

# Model
MODEL_TAB = "model-tab"
CHOOSE = "choose"
MODEL = "model"
REFRESH = "refresh"
LOAD_CANCEL = "load-cancel"
LOADING = "loading"
DOWNLOAD = "download"
REPOSITORY = "repository"
REPO = "repo"
LIST_BRANCHES = "list-branches"
BRANCHES = "branches"
BRANCH = "branch"
DOWNLOAD_BUTTONS = "download-buttons"
START = "start"
CANCEL = "cancel"
DOWNLOADING = "downloading"
NO_DOWNLOADS = "no-downloads"
HOW = "how"
DEVICE = "device"
BACKEND = "backend"
LOAD_TEMPLATE = "load-template"
CONTEXT = "context"
MODEL_BUTTONS = "model-buttons"
SAVE = "save"
RELOAD = "reload"
UNLOAD = "unload"
PLAN = "plan"
PLAN_HEADLINE = "plan-headline"
FACTS = "facts"

# Classes
CARRIER_CLASS = "carrier"  # in the page, for page.js and the server, and not seen
HEADING_CLASS = "heading"
NAMED_CLASS = "named"
SHEET_CLASS = "sheet"  # tables of facts
STATUS_CLASS = "status"  # a line below a reply
STOPS_CLASS = "stops"  # a button that Escape presses
WORK_CLASS = "work"  # how far something has come, and how it ended
