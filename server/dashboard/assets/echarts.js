// The charts that the pages use, and nothing else of ECharts.
export { init, getInstanceByDom } from "echarts/core";
import { use } from "echarts/core";
import { LineChart, HeatmapChart, BarChart } from "echarts/charts";
import { AriaComponent, DataZoomComponent, GridComponent, LegendComponent, MarkLineComponent, TitleComponent, TooltipComponent, VisualMapComponent } from "echarts/components";
import { CanvasRenderer } from "echarts/renderers";

use([LineChart, HeatmapChart, BarChart, AriaComponent, DataZoomComponent, GridComponent, LegendComponent, MarkLineComponent, TitleComponent, TooltipComponent, VisualMapComponent, CanvasRenderer]);
