#!lua flags=allow-oom
-- told: a provider tells what became of deliveries.
-- ARGV[1] for how long an event counts once (ms); then of each event: event (as it stands in keys), id of the delivery,
--   status, error (JSON; '' none)
-- Returns: time (us); then of each event, in order: 'applied' | 'late' (it stands higher already; nothing was changed) |
--   'duplicate' (this event was told before) | 'unknown_delivery'; and of an applied one: the delivery's type, its provider,
--   how long it took since it was due (ms).
-- Invariant: a status only rises, so events may come in any order and any number of times.
local now_us = clock_us()
for at = 2, #ARGV, 4 do
  check_type(KEY.told .. ARGV[at], 'string')
  check_type(KEY.delivery .. ARGV[at + 1], 'hash')
end
check_type(KEY.events, 'stream')

local function told(event, id, status, error_text)
  if call('EXISTS', event) == 1 then return {'duplicate'} end
  local delivery = read_delivery(id)
  if not delivery then return {'unknown_delivery'} end
  call('SET', event, id, 'PX', ARGV[1])
  if not raise_delivery(id, delivery, status, error_text, now_us) then return {'late'} end
  return {'applied', delivery.type, delivery.provider or '',
    digits(math.max(0, math.floor(now_us / 1000) - tonumber(delivery.due_ms)))}
end

local answer = {digits(now_us)}
for at = 2, #ARGV, 4 do
  answer[#answer + 1] = told(KEY.told .. ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3])
end
return answer
