"""The HTML template of the report, as a string because a Flower app bundle cannot contain HTML files."""

from __future__ import annotations

__all__ = ["TABLE", "TEMPLATE"]

TABLE = """{%- macro table(grid, caption) %}
<div class="wide" tabindex="0" role="region" aria-label="{{ caption|truncate(60) }}">
<table{% if grid.equal_columns %} class="even"{% endif %}>
<caption>{{ caption }}</caption>
<thead><tr>
{%- for head in grid.header %}
<th scope="col"{% if loop.index0 in grid.text_columns %} class="text"{% endif %}>{{ head }}</th>
{%- endfor %}
</tr></thead>
<tbody>
{% for row in grid.rows -%}
<tr{% if row.kind %} class="{{ row.kind }}"{% endif %}><th scope="row">{{ row.name }}
{%- if row.note %}<small>{{ row.note }}</small>{% endif %}</th>
{%- for cell in row.cells %}
{%- set name = "text" if loop.index in grid.text_columns else "best" if loop.index0 in row.best else "" %}
<td{% if name %} class="{{ name }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor -%}
</tbody>
</table>
</div>
{%- endmacro %}"""
"""Macro that renders a `Grid`; the dashboard uses it as well."""

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
{%- macro figure(svg, caption) %}
<figure>
<div class="wide" tabindex="0" role="region" aria-label="{{ caption|truncate(60) }}">{{ svg }}</div>
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
<p class="headline">{{ view.headline }}</p>
{%- if view.numbers %}
<dl class="numbers">
{%- for label, value in view.numbers.items() %}
<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}
</dl>
{%- endif %}
</header>
<main>
{%- if view.versions.rows %}
<section>
<h2>Versions</h2>
{{ table(view.versions, "Accuracy of each version on the test images of each site") }}
<p class="note">Nothing was trained. Spread: best minus worst site, in percentage points.</p>
</section>
{%- else %}
<section>
<h2>Methods</h2>
{%- if view.methods.rows %}
{{ table(view.methods, "Results over the test images of all sites, by method") }}
<p class="note">{{ view.methods_note }}</p>
{%- if view.confusion.rows %}
<details open><summary>Confusion matrix of the federated model</summary>
{{ table(view.confusion, "Test images of all sites: rows are true classes, columns predicted classes") }}
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
{%- if view.sites_figure %}
{{ figure(view.sites_figure, view.sites_figure_caption) }}
{%- endif %}
{%- if view.sites.rows %}
<figure>{{ table(view.sites, view.sites_caption) }}</figure>
{%- else %}
<p class="quiet">No site has reported yet.</p>
{%- endif %}
</section>
<section>
<h2>Rounds</h2>
{%- if view.accuracy_figure %}
{{ figure(view.accuracy_figure, view.accuracy_caption) }}
{%- else %}
<p class="quiet">No round has been evaluated yet.</p>
{%- endif %}
{%- if view.rounds.rows %}
<details class="rounds"><summary>Rounds as numbers</summary>
{{ table(view.rounds, "Accuracy of the model that each round started from; bytes summed over all sites") }}
</details>
{%- endif %}
</section>
<section>
<h2>The sigma shift</h2>
{%- if view.shift_figure %}
{{ figure(view.shift_figure, view.shift_caption) }}
{%- for magnitude in view.shift_magnitudes %}
<details><summary>{{ magnitude.title }} as numbers</summary>
{{ table(magnitude.grid, magnitude.title ~ ": mean absolute shift by part and layer, in thousandths") }}
</details>
{%- endfor %}
{%- else %}
<p class="quiet">{{ view.shift_missing }}</p>
{%- endif %}
</section>
{%- if view.explanation.rows %}
<section>
<h2>Explanation</h2>
<details><summary>What the most changed attention heads write more and less of</summary>
{{ table(view.explanation, "Attention heads with the largest share of the change") }}
</details>
{%- for entry in view.explanation_by_site %}
<details><summary>{{ entry.site }}: its last shift</summary>
{{ table(entry.grid, "Attention heads that the last training at " ~ entry.site ~ " changed most") }}
</details>
{%- endfor %}
<p class="note">Descriptions are ranked without images, by how strongly a head writes along their text
embedding. They are limited by the backbone's text tower and ignore later layers.</p>
</section>
{%- endif %}
<section>
<h2>Communication</h2>
{%- if view.bytes_figure %}
<p>{{ view.bytes_text }}</p>
{{ figure(view.bytes_figure, view.bytes_caption) }}
{%- else %}
<p class="quiet">Nothing was exchanged yet.</p>
{%- endif %}
</section>
{%- endif %}
<section>
<h2>Problems</h2>
{%- if view.notices.rows %}
{{ table(view.notices, "Problems during the run") }}
{%- if view.notices_omitted %}
<p class="note">{{ view.notices_omitted }}</p>
{%- endif %}
{%- else %}
<p class="quiet">{{ view.no_notices }}</p>
{%- endif %}
</section>
<section>
<h2>The study</h2>
<dl class="study">
{%- for label, value in view.study.items() %}
<dt>{{ label }}</dt><dd>{{ value }}</dd>
{%- endfor %}
</dl>
<details><summary>The complete study file, with defaults filled in</summary>
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
