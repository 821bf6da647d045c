#!lua flags=allow-oom
-- take: read the next entries of a stage by the shares of its priorities, without blocking.
-- KEYS[1..3] job:<stage>_in:high, job:<stage>_in, job:<stage>_in:low
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] at most (entries)  ARGV[4..6] owed to each priority (entries)
-- Returns: time (us), then per entry three values: stream number (1..3), entry id, fields.
-- Invariant: what the shares owe comes first; what is left goes to high, then normal, then low. A stream of a wrong type
--   does not hide what was read from another: refused is only a call that could read nothing else.
local answer = {digits(clock_us())}
local refused
local left = tonumber(ARGV[3])
local function read(number, count)
  count = math.min(count, left)
  if count < 1 then return end
  local reply = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', count, 'STREAMS', KEYS[number], '>')
  if not reply then return end
  if reply.err then -- of one stream: nothing was read
    if not string.find(reply.err, 'WRONGTYPE', 1, true) then error(reply.err) end
    refused = reply
    return
  end
  for _, entry in ipairs(reply[1][2]) do
    answer[#answer + 1] = number
    answer[#answer + 1] = entry[1]
    answer[#answer + 1] = entry[2]
    left = left - 1
  end
end
for number = 1, 3 do read(number, tonumber(ARGV[3 + number])) end
for number = 1, 3 do read(number, left) end
if refused and #answer == 1 then return refused end
return answer
