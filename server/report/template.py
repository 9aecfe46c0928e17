"""The report's HTML. It is a Python text, not a file beside the code, since an app bundle carries no HTML."""

from __future__ import annotations

__all__ = ["TABLE", "TEMPLATE"]

TABLE = """{%- macro table(grid, caption) %}
<div class="wide" tabindex="0" role="region" aria-label="{{ caption|truncate(60) }}">
<table{% if grid.even %} class="even"{% endif %}>
<caption>{{ caption }}</caption>
<thead><tr>
{%- for head in grid.heads %}
<th scope="col"{% if loop.index0 in grid.texts %} class="text"{% endif %}>{{ head }}</th>
{%- endfor %}
</tr></thead>
<tbody>
{% for row in grid.rows -%}
<tr{% if row.kind %} class="{{ row.kind }}"{% endif %}><th scope="row">{{ row.name }}
{%- if row.note %}<small>{{ row.note }}</small>{% endif %}</th>
{%- for cell in row.cells %}
{%- set name = "text" if loop.index in grid.texts else "best" if loop.index0 in row.best else "" %}
<td{% if name %} class="{{ name }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor -%}
</tbody>
</table>
</div>
{%- endmacro %}"""
"""A macro that writes a `Grid`; other pages use it, too."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ view.name }} – FedSigma</title>
<style>{{ style }}</style>
</head>
<body>
{%- macro figure(drawing, caption) %}
<figure>
<div class="wide" tabindex="0" role="region" aria-label="{{ caption|truncate(60) }}">{{ drawing }}</div>
<figcaption>{{ caption }}</figcaption>
</figure>
{%- endmacro %}
@table@
<header>
<p class="kicker">Federated study</p>
<h1>{{ view.name }}</h1>
<p class="facts">
{%- for fact in view.facts %}<span{% if loop.first %} class="state"{% endif %}>{{ fact }}</span>{% endfor -%}
</p>
{%- if view.failure %}
<p class="alarm" role="status"><strong>The run failed:</strong> {{ view.failure }}</p>
{%- endif %}
<p class="lead">{{ view.lead }}</p>
{%- if view.numbers %}
<dl class="numbers">
{%- for number in view.numbers %}
<div><dt>{{ number.what }}</dt><dd>{{ number.value }}</dd></div>
{%- endfor %}
</dl>
{%- endif %}
</header>
<main>
{%- if view.versions.rows %}
<section>
<h2>Versions</h2>
{{ table(view.versions, "Accuracy of each version on the test images of each site") }}
<p class="note">Nothing was trained. Spread: the best site less the worst, in percentage points.</p>
</section>
{%- else %}
<section>
<h2>Methods</h2>
{%- if view.methods.rows %}
{{ table(view.methods, "Results over the test images of all sites, by method") }}
<p class="note">{{ view.methods_note }}</p>
{%- if view.confusion.rows %}
<details open><summary>What the federated model takes for what</summary>
{{ table(view.confusion, "Test images of all sites: rows are what they show, columns what the model says") }}
{%- if view.confusion_note %}
<p class="note">{{ view.confusion_note }}</p>
{%- endif %}
</details>
{%- endif %}
{%- else %}
<p class="quiet">{{ view.no_results }}</p>
{%- endif %}
</section>
<section>
<h2>Sites</h2>
{%- if view.sites_drawing %}
{{ figure(view.sites_drawing, view.sites_drawing_caption) }}
{%- endif %}
{%- if view.sites.rows %}
<figure>{{ table(view.sites, view.sites_caption) }}</figure>
{%- else %}
<p class="quiet">No site has reported yet.</p>
{%- endif %}
</section>
<section>
<h2>Rounds</h2>
{%- if view.accuracy_drawing %}
{{ figure(view.accuracy_drawing, view.accuracy_caption) }}
{%- else %}
<p class="quiet">No round has been evaluated yet.</p>
{%- endif %}
{%- if view.rounds.rows %}
<details class="rounds"><summary>Rounds as numbers</summary>
{{ table(view.rounds, "Accuracy of the model each round began with, and bytes of all sites together") }}
</details>
{%- endif %}
</section>
<section>
<h2>The sigma shift</h2>
{%- if view.heat_drawing %}
{{ figure(view.heat_drawing, view.heat_caption) }}
{%- for heat in view.heats %}
<details><summary>{{ heat.title }} as numbers</summary>
{{ table(heat.grid, heat.title ~ ": mean absolute shift by part and layer, in thousandths") }}
</details>
{%- endfor %}
{%- else %}
<p class="quiet">{{ view.heat_problem }}</p>
{%- endif %}
</section>
{%- if view.explanation.rows %}
<section>
<h2>In words</h2>
<details><summary>What the heads that changed most write more and less of</summary>
{{ table(view.explanation, "The attention heads with the largest share of the change") }}
</details>
{%- for one in view.explanation_by_site %}
<details><summary>{{ one.site }}: its own last shift</summary>
{{ table(one.grid, "The attention heads that the last training at " ~ one.site ~ " left changed most") }}
</details>
{%- endfor %}
<p class="note">Descriptions ranked without any image, by what a head can write along them. They are as good
as the backbone's text tower, and leave out what later layers do.</p>
</section>
{%- endif %}
<section>
<h2>What crossed the wire</h2>
{%- if view.bytes_drawing %}
<p>{{ view.bytes_words }}</p>
{{ figure(view.bytes_drawing, view.bytes_caption) }}
{%- else %}
<p class="quiet">Nothing was exchanged yet.</p>
{%- endif %}
</section>
{%- endif %}
<section>
<h2>Events worth knowing</h2>
{%- if view.notices.rows %}
{{ table(view.notices, "Everything that went otherwise than planned") }}
{%- if view.notices_left %}
<p class="note">{{ view.notices_left }}</p>
{%- endif %}
{%- else %}
<p class="quiet">{{ view.no_notices }}</p>
{%- endif %}
</section>
<section>
<h2>The study</h2>
<dl class="study">
{%- for fact in view.study %}
<dt>{{ fact.what }}</dt><dd>{{ fact.value }}</dd>
{%- endfor %}
</dl>
<details><summary>The whole study file, as resolved</summary>
<pre>{{ view.study_yaml }}</pre>
</details>
</section>
</main>
<footer>
<p>Written by FedSigma {{ view.version }} on {{ view.written }} from the run folder {{ view.folder }}.
For research; not for clinical use.</p>
</footer>
</body>
</html>
"""

TEMPLATE = _PAGE.replace("@table@", TABLE)
